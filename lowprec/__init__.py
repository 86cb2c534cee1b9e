"""lowprec: pretrain language models in low precision, from one YAML file.

Floors, each importing only from the floors below it (checked by ``make check``)::

    launch, tools -> train -> config -> parallel -> {linear, model, data, optim} -> numerics

``kernels`` holds fast paths that must equal the plain-torch definitions bit for bit; they are loaded by name.
"""

__version__ = "0.1.0"
