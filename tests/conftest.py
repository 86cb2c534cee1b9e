"""Settings every test shares: offline, one torch thread, the same examples on every run.

They are set here, before torch and the hub libraries are imported, and are defaults of the *tests* only: nothing in
lowprec reads an environment variable that changes numbers. Subprocesses inherit them, and find this checkout first on
their path, installed or not.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest-xdist and spawned ranks share the cores
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # what the `make` above us was told is not for those that tests start
    os.environ.pop(name, None)

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

# Property tests draw the same examples everywhere and may take their time: a red test is red again on the next machine.
settings.register_profile(
    "lowprec", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lowprec")
