"""capture: the tensors that a model's linear layers multiply, from a run that was trained or from a recipe at step 0.

    from lowprec.tools.capture import capture
    for layer, c in capture(Path("runs/nvfp4"), "layers.*.down_proj").items():
        c.x_TK, c.w_NK, c.dy_TN                      # y = x w^T, dx = dy w, dw = dy^T x

The micro-batch that training would take next runs forward and backward with the precision of that step, so the tensors
are those of training, to the last bit (:mod:`lowprec.train.loaded`).

What this is not: a probe inside a training loop. Without a folder, `open_recipe` gives the model of a shipped recipe
with its initial weights, and `add_source` / `open_source` are the command-line arguments of both.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import lowprec.recipes
from lowprec.config import Run, load
from lowprec.data import build_data
from lowprec.linear.precision import pick
from lowprec.train.loaded import Captured, Loaded, Micro, materialise, open_run, ready

__all__ = ["Captured", "Loaded", "Micro", "add_source", "capture", "open_recipe", "open_run", "open_source"]


def capture(run_dir: Path, match: str = "*", step: int | None = None, tokens: int | None = None) -> dict[str, Captured]:
    """The operands of a run's linear layers by name; see `open_run` and `Loaded.capture` for arguments and errors."""
    return open_run(run_dir, step).capture(match, tokens)


def open_recipe(name: str, overrides: list[str] | None = None) -> Loaded:
    """The model of a shipped recipe (recipes/recipe/) with its initial weights, at the beginning of its data.

    overrides: `key=value` settings as on the command line of lowprec-train. Raises ValueError for a name or a key that
    does not exist, and for data that cannot be had.
    """
    shipped = Path(lowprec.recipes.__path__[0]) / "recipe"
    pick("recipe", name, sorted(path.stem for path in shipped.glob("*.yaml")), "--recipe")
    # `++` lets any key of the precision, a free mapping to Hydra, through to its own reader
    wishes = [f"++{wish}" if wish.startswith("precision.") else wish for wish in overrides or []]
    ConfigStore.instance().store(name="schema", node=Run)
    try:
        with initialize_config_module("lowprec.recipes", version_base="1.3"):
            run = load(compose("train", overrides=[f"recipe={name}", *wishes]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"recipe {name}: {str(error).splitlines()[0]}") from error
    data = build_data(run.data, run.seed)
    run = replace(run, name=run.name or name, model=replace(run.model, vocab_size=data.vocab_size))
    model, plan = materialise(run)
    model.init_weights(run.seed)
    return ready(run, model, plan, data, 0, None)


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds RUN, --step, --recipe and --set, for `open_source`."""
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run folder with a checkpoint")
    parser.add_argument("--step", type=int, help="the checkpoint after so many steps (default: the newest)")
    parser.add_argument("--recipe", metavar="NAME", help="instead of RUN: a shipped recipe with its initial weights")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of --recipe, as for lowprec-train"
    )


def open_source(options: argparse.Namespace) -> Loaded:
    """What the arguments of `add_source` name. Raises ValueError as `open_run` and `open_recipe` do."""
    if (options.run is None) == (options.recipe is None):
        raise ValueError("give either the folder of a run or --recipe NAME")
    if options.recipe is None and options.set:
        raise ValueError("--set goes with --recipe; a run has the settings it was trained with")
    if options.recipe is not None and options.step is not None:
        raise ValueError("--step goes with a run; --recipe has its initial weights only")
    return open_run(options.run, options.step) if options.run else open_recipe(options.recipe, options.set)
