"""What recipes remember between steps is part of a run: interrupted, on other ranks, and after a bad step."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lowprec.train import loop

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # reading without a group

DELAYED = "{format: fp8_tensor, amax: delayed, window: 3}"
DELAYED_E5M2 = "{format: fp8_tensor_e5m2, amax: delayed, window: 3}"
HELD = "{format: nvfp4, amax: hold, window: 3}"
MEAN = "{format: nvfp4, split: {kind: mean, term: exact, stat: ema, decay: 0.5}}"
RECIPES = {
    "fp8_delayed": f"{{fprop: {{x: {DELAYED}, w: {DELAYED}}}, dgrad: {{dy: {DELAYED_E5M2}, w: {{reuse: fprop}}}}, "
    f"wgrad: {{dy: {DELAYED_E5M2}, x: {{reuse: fprop}}}}}}",
    "held": f"{{fprop: {{x: {HELD}, w: nvfp4_2d}}, wgrad: {{dy: {HELD}, x: nvfp4}}}}",
    "centred": f"{{fprop: {{x: {MEAN}, w: nvfp4_2d}}}}",
}


def settings(name: str) -> tuple[str, ...]:
    """A run in one of RECIPES, which takes the place of whatever the recipe file has."""
    return (
        "recipe=bf16_tiny",
        f"precision.linear={{{name}: {RECIPES[name]}}}",
        f"precision.rules=[{{match: lm_head, recipe: bf16}}, {{match: 'layers.*', recipe: {name}}}]",
    )


def memories(folder: Path) -> dict[str, Tensor]:
    """All `precision/` tensors of the newest checkpoint, read without any model."""
    path = max((folder / "checkpoints").glob("step_*"))
    held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {key: torch.empty(entry.size) for key, entry in held.items() if key.startswith("precision/")}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


def forget_last(folder: Path) -> None:
    """As if the run had been killed after its second newest checkpoint."""
    shutil.rmtree(max((folder / "checkpoints").glob("step_*")))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_remembers(train, compare, tmp_path: Path, name: str) -> None:
    """Interrupted after step 5 of 8, every kind of memory goes on bit for bit; checkpoints hold it by plain keys."""
    whole, broken, options = tmp_path / "whole", tmp_path / "broken", settings(name)
    assert train(whole, *options) == 0
    assert train(broken, *options, "train.checkpoint_every=5") == 0
    forget_last(broken)
    assert train(broken, *options, "train.checkpoint_every=5") == 0
    assert compare(broken) == compare(whole)
    found = memories(whole)
    assert same(found, memories(broken))
    key = {"fp8_delayed": "fprop.w.amax", "held": "wgrad.dy.amax", "centred": "x.mean"}[name]
    tensor = found[f"precision/layers.1.mlp.down_proj/{key}"]
    assert tensor.shape == {"fp8_delayed": (3,), "held": (), "centred": (128,)}[name]
    assert (tensor != 0).any() and tensor.isfinite().all()


def test_what_is_remembered_matters(train, compare, tmp_path: Path) -> None:
    """The equalities above could fail: without its memories a resumed run gives other numbers, and says so."""
    whole, broken, options = tmp_path / "whole", tmp_path / "broken", settings("fp8_delayed")
    assert train(whole, *options) == 0
    assert train(broken, *settings("centred"), "train.checkpoint_every=5") == 0
    forget_last(broken)
    assert train(broken, *options, "run.allow_change=true") == 0
    assert compare(broken)[5:] != compare(whole)[5:]
    current = [o.replace("amax: delayed, window: 3", "amax: current") for o in options]
    assert train(tmp_path / "current", *current) == 0
    assert compare(tmp_path / "current")[1][:6] != compare(whole)[1][:6], "delayed scaling differs from current"


def test_another_recipe_begins_its_memories_anew(train, read, tmp_path: Path, capsys) -> None:
    """A checkpoint loads under any recipe: memories it does not hold, or of another window, are empty; this is said."""
    options = settings("fp8_delayed")
    assert train(tmp_path, *options) == 0
    shorter = [o.replace("window: 3", "window: 2") for o in options]
    capsys.readouterr()
    assert train(tmp_path, *shorter, "train.steps=10", "run.allow_change=true", "schedule=constant") == 0
    layers = 2 * 7
    assert f"does not hold {layers * 4} of the recipe's memories" in capsys.readouterr().out
    assert all(tensor.shape == (2,) for tensor in memories(tmp_path).values())
    assert len(read(tmp_path)) == 10
    assert train(tmp_path, "recipe=bf16_tiny", "train.steps=12", "run.allow_change=true", "schedule=constant") == 0


def test_recomputation_remembers_the_same(train, compare, tmp_path: Path) -> None:
    """A forward pass that is run again shows everything twice: no number and no memory changes."""
    for name in ("fp8_delayed", "centred"):
        kept, again = tmp_path / name, tmp_path / f"{name}_again"
        assert train(kept, *settings(name), "train.steps=4") == 0
        assert train(again, *settings(name), "train.steps=4", "parallel=fsdp_recompute") == 0
        assert compare(again) == compare(kept)
        assert same(memories(again), memories(kept))


def test_one_rank_goes_on_from_two_and_two_from_one(train, spawn, compare, read, tmp_path: Path) -> None:
    """Delayed FP8 on one rank, on two, from one to two and from two to one: the same numbers and memories; so with an
    open window of de-oscillation, from steps 5 to 7."""
    rest = "+precision.deoscillation={ratio: 1.5, start: 0.0, every: 4, window: 3, sample: 0.5}"
    options = (*settings("fp8_delayed"), rest, "train.checkpoint_every=6")

    def two(folder: Path) -> None:
        output, _ = (process := spawn(folder, *options, ranks=2)).communicate(timeout=180)
        assert process.returncode == 0, output

    one, pair = tmp_path / "one", tmp_path / "pair"
    assert train(one, *options) == 0
    assert all(record["osc_ratio"] > 0 for record in read(one) if record["step"] in (3, 7))
    two(pair)
    assert compare(pair) == compare(one)
    expected = memories(one)
    assert same(memories(pair), expected)
    forget_last(one)
    forget_last(pair)
    two(one)
    assert train(pair, *options) == 0
    assert compare(one) == compare(pair)
    assert same(memories(one), expected) and same(memories(pair), expected)


def test_a_poisoned_step_is_not_remembered(train, tmp_path: Path, monkeypatch) -> None:
    """A step with a NaN loss ends the run; no history of any layer has taken anything of it."""
    seen: list[dict[str, Tensor]] = []
    forward_backward = loop.forward_backward

    def poisoned(session, batch):
        seen.append({k: t.clone() for k, t in session.state.state_dict().items() if k.startswith("precision/")})
        if session.state.step == 3:
            with torch.no_grad():
                session.state.engine.model.layers[0].attn.q_proj.weight.to_local()[0, 0] = torch.nan
        if session.state.step == 4:
            raise KeyboardInterrupt
        return forward_backward(session, batch)

    monkeypatch.setattr(loop, "forward_backward", poisoned)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, *settings("fp8_delayed"), "train.eval_every=0", "train.log_every=8")
    assert len(seen) == 5
    assert not same(seen[2], seen[3]), "a good step is remembered"
    assert same(seen[3], seen[4])
    assert all(tensor.isfinite().all() for tensor in seen[4].values())
