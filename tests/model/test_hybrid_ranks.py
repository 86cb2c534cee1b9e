"""A hybrid on several ranks: the losses of one process, sharded, recomputed and cut into stages; what is refused."""

import pytest

from lowprec.config import load
from lowprec.launch.train import compose_run
from lowprec.parallel.tensor import refuse_scan
from tests.layouts import train_on

pytestmark = pytest.mark.distributed

HYBRID = ["model=nemotron_h_tiny", "model.layers=5", "model.pattern=M-*M-", "train.steps=3"]
HYBRID += ["model.mamba.heads=8", "model.mamba.head_dim=16", "model.mamba.state=16"]


def test_layouts_agree_and_the_loss_falls(tmp_path):
    """nvfp4 on packed text: two stages, each sharded over two ranks and recomputed, give one rank's losses exactly."""
    layouts = {"one": (1, []), "four": (4, ["parallel=pp", "parallel.recompute=full"])}
    losses = {
        name: [line["loss"] for line in train_on(ranks, tmp_path, *HYBRID, f"run.dir={name}", *words) if "loss" in line]
        for name, (ranks, words) in layouts.items()
    }
    assert len(losses["one"]) == 3 and losses["one"][-1] < losses["one"][0] - 0.3
    assert losses["four"] == losses["one"]


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_mamba_is_not_cut(axis):
    """Tensor and context parallelism are refused in a sentence that says what to do, but only where there is an M."""
    model = load(compose_run(["recipe=bf16_tiny", "model=nemotron_h_tiny"], [])).model
    sizes = {"tp": 1, "cp": 1, axis: 2}
    with pytest.raises(ValueError, match=rf"parallel.{axis}=2: the Mamba-2 blocks .* set parallel.{axis}=1"):
        refuse_scan(model, **sizes)
    model.layers, model.pattern = 4, "*-*-"
    refuse_scan(model, **sizes)
