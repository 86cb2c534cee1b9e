"""What a layer remembers between steps: reading, observing, folding, ranks and checkpoints."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec.linear.recipe import Gemm, LinearRecipe, Operand
from lowprec.linear.split import ChannelSplit, MeanSplit
from lowprec.linear.state import LayerState, Memory, end_step, load_state_dict, memories_of, state_dict
from lowprec.numerics import FORMATS

NAN, INF = float("nan"), float("inf")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(float(value))


def full() -> dict[str, LayerState]:
    """Two layers that remember something of every kind."""
    kinds = {
        "x.amax": Memory("history", length=3),
        "w.amax": Memory("hold", every=2),
        "x.mean": Memory("ema", length=2, decay=0.5),
        "x.energy": Memory("total", length=2, span=(1, 3)),
    }
    return {"b": LayerState(kinds), "a": LayerState({"x.amax": Memory("history", length=3)})}


def show(states: dict[str, LayerState], step: int) -> None:
    """Two micro-batches of made-up observations of a step."""
    for micro in (0, 1):
        value = scalar(1 + step * 7 % 5 + micro)
        states["a"].observe("x.amax", value, micro)
        states["b"].observe("x.amax", value * 2, micro)
        states["b"].observe("w.amax", value * 3, micro)
        states["b"].observe("x.mean", torch.stack([value, -value]), micro)
        states["b"].observe("x.energy", torch.stack([value, value]) ** 2, micro)


def read(states: dict[str, LayerState], step: int) -> list[torch.Tensor | None]:
    """All that a forward pass of `step` could ask for."""
    b = states["b"]
    return [
        states["a"].amax("x.amax", scalar(9)), b.amax("x.amax", scalar(9)), b.held("w.amax", step), b.mean("x.mean"),
        b.total("x.energy", step),
    ]  # fmt: skip


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> bool:
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b))


def test_history_is_the_largest_of_the_window():
    """Delayed scaling: the tensor's own maximum first, then the largest of the last three steps, never the present."""
    state = LayerState({"x": Memory("history", length=3)})
    used = []
    for step, amax in enumerate([5.0, 1.0, 2.0, 0.5, 0.25]):
        state.observe("x", scalar(amax / 2), 0)
        state.observe("x", scalar(amax), 1)
        used.append(state.amax("x", scalar(amax)).item())
        end_step({"layer": state}, step)
    assert used == [5.0, 5.0, 5.0, 5.0, 2.0]
    assert torch.equal(state.tensors["x"], t(0.25, 0.5, 2.0))


def test_a_tensor_that_was_zero_does_not_saturate_what_comes():
    """A gradient is zero before a layer that starts at zero: its history says nothing, so the present maximum is
    used; a sample of zero is not held either."""
    state = LayerState({"h": Memory("history", length=2), "s": Memory("hold", every=50)})
    state.observe("h", scalar(0), 0)
    state.observe("s", scalar(0), 0)
    end_step({"layer": state}, 0)
    assert state.amax("h", scalar(3)) == 3
    assert state.held("s", 1) is None
    state.observe("s", scalar(4), 0)
    end_step({"layer": state}, 1)
    assert state.held("s", 2) == 4


def test_hold_samples_at_multiples_and_holds_between():
    """Sample and hold every three steps: steps 0 and 3 use their own maximum, the others the last sample."""
    state = LayerState({"x": Memory("hold", every=3)})
    used = []
    for step in range(6):
        used.append(None if (held := state.held("x", step)) is None else held.item())
        state.observe("x", scalar(10 + step), 0)
        end_step({"layer": state}, step)
    assert used == [None, 10, 10, None, 13, 13]


def test_the_mean_enters_whole_then_decays():
    """EMA over steps of the mean over micro-batches; frozen within a step; zero before the first."""
    state = LayerState({"x": Memory("ema", length=2, decay=0.75)})
    assert torch.equal(state.mean("x"), t(0, 0))
    state.observe("x", t(1, 2), 0)
    state.observe("x", t(3, 4), 1)
    assert torch.equal(state.mean("x"), t(0, 0))
    end_step({"layer": state}, 0)
    assert torch.equal(state.mean("x"), t(2, 3))
    end_step({"layer": state}, 1)  # nothing seen: nothing forgotten
    assert torch.equal(state.mean("x"), t(2, 3))
    state.observe("x", t(6, -1), 0)
    end_step({"layer": state}, 2)
    assert torch.equal(state.mean("x"), t(3, 2))


def test_the_total_collects_its_span_only():
    """Sums of steps 1 and 2; known from step 3 on."""
    state = LayerState({"x": Memory("total", length=1, span=(1, 3))})
    seen = []
    for step in range(5):
        seen.append(None if (total := state.total("x", step)) is None else total.item())
        state.observe("x", t(10**step), 0)
        end_step({"layer": state}, step)
    assert seen == [None, None, None, 110, 110]


def test_what_is_computed_again_counts_once():
    """Activation recomputation shows one of two micro-batches twice: nothing changes, in any kind of memory."""
    once, twice = full(), full()
    for step in range(3):
        show(once, step)
        show(twice, step)
        twice["b"].observe("x.amax", scalar(1), 0)
        twice["b"].observe("x.mean", t(100, 100), 1)
        twice["b"].observe("x.energy", t(100, 100), 1)
        end_step(once, step)
        end_step(twice, step)
        assert same(read(once, step + 1), read(twice, step + 1))


@pytest.mark.parametrize("poison", [NAN, INF])
def test_what_is_not_finite_is_never_folded(poison):
    """A poisoned micro-batch leaves every tensor as it was, first step included; the next good step is folded."""
    states = full()
    for step in range(3):
        if step == 1:
            show(states, 1)
            end_step(states, 1)
            continue
        before = {key: tensor.clone() for key, tensor in state_dict(states).items()}
        show(states, step)
        for state in states.values():
            state.observe("x.amax", scalar(poison), 2)
        states["b"].observe("w.amax", scalar(poison), 2)
        states["b"].observe("x.mean", t(poison, 1), 2)
        states["b"].observe("x.energy", t(poison, 1), 2)
        end_step(states, step)
        after = state_dict(states)
        for key in ("a/x.amax", "b/x.amax", "b/w.amax"):
            assert torch.equal(after[key], before[key]), key
        for key in ("b/x.mean", "b/x.energy"):
            assert torch.equal(after[key][:1], before[key][:1]) or after[key][:1].isnan().all(), key
    assert states["a"].amax("x.amax", scalar(9)) == 4 and states["b"].held("w.amax", 3) == 12
    assert torch.isfinite(states["b"].mean("x.mean")).all()


def test_a_step_that_is_not_accepted_folds_nothing():
    """accept=False (the update was skipped) keeps all tensors, although all observations are finite."""
    states = full()
    show(states, 0)
    end_step(states, 0, accept=torch.tensor(True))
    before = {key: tensor.clone() for key, tensor in state_dict(states).items()}
    show(states, 2)
    end_step(states, 2, accept=torch.tensor(False))
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_dict(states).items())
    show(states, 2)
    end_step(states, 2, accept=torch.tensor(True))
    assert all(not torch.equal(tensor, before[key]) for key, tensor in state_dict(states).items())


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_fresh_model_goes_on_from_saved_tensors(steps):
    """Loaded before any forward, after any number of steps: the same reads and folds from then on."""
    whole = full()
    for step in range(steps):
        show(whole, step)
        end_step(whole, step)
    fresh = full()
    load_state_dict(fresh, state_dict(whole))
    for step in range(steps, steps + 4):
        assert same(read(fresh, step), read(whole, step))
        show(whole, step)
        show(fresh, step)
        end_step(whole, step)
        end_step(fresh, step)
    assert same(list(state_dict(fresh).values()), list(state_dict(whole).values()))


def test_other_recipes_are_told():
    """Missing, unknown and misshapen keys are one sentence, and nothing is changed."""
    states, saved = full(), state_dict(full())
    saved["a/x.amax"] = t(1, 2, 3)
    del saved["b/x.mean"]
    saved["c/x.amax"] = t(1)
    saved["b/x.amax"] = t(1, 2)
    with pytest.raises(ValueError) as error:
        load_state_dict(states, saved)
    for part in ("b/x.mean is missing", "c/x.amax is unknown", "b/x.amax has shape (2,) instead of (3,)"):
        assert part in str(error.value)
    assert torch.equal(states["a"].tensors["x.amax"], t(0, 0, 0))


def test_mistakes_are_told():
    """Unknown keys, kinds and shapes."""
    state = full()["a"]
    with pytest.raises(ValueError, match=r"nothing is remembered as 'dy.amax'.*x.amax"):
        state.observe("dy.amax", scalar(1), 0)
    with pytest.raises(ValueError, match=r"shape \(\), got \(2,\)"):
        state.observe("x.amax", t(1, 2), 0)
    with pytest.raises(ValueError, match="choose one of history, hold, ema, total"):
        Memory("hostory")
    for bad in ({"length": 0}, {"every": 0}, {"decay": 1.0}, {"span": (3, 2)}):
        with pytest.raises(ValueError, match="at least 1"):
            Memory("ema", **bad)


def test_a_recipe_says_what_must_be_remembered():
    """Keys and sizes by operand; forward codes that are reused need no memory of their own; contradictions refused."""
    fp8 = FORMATS["fp8_tensor"]
    delayed = Operand(fp8, amax="delayed", window=16)
    ema = Operand(FORMATS["nvfp4"], split=MeanSplit("exact", "ema", 0.9))
    channels = Operand(FORMATS["nvfp4"], split=ChannelSplit(FORMATS["mxfp8"], 0.1, (5, 9)))
    recipe = LinearRecipe(
        "mixed",
        Gemm(delayed, dataclasses.replace(delayed, amax="hold", window=50)),
        Gemm(ema, dataclasses.replace(delayed, reuse=True)),
        Gemm(ema, channels),
    )
    assert memories_of([recipe, LinearRecipe("plain")], out_features=3, in_features=5) == {
        "fprop.x.amax": Memory("history", length=16),
        "fprop.w.amax": Memory("hold", every=50),
        "dy.mean": Memory("ema", length=3, decay=0.9),
        "x.energy": Memory("total", length=5, span=(5, 9)),
    }
    other = LinearRecipe("later", Gemm(dataclasses.replace(delayed, window=8)))
    with pytest.raises(ValueError, match=r"recipe later: 'fprop\.x\.amax' is remembered in two ways"):
        memories_of([recipe, other], 3, 5)


RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_state import full, scalar, t
from lowprec.linear.state import end_step, state_dict
rank, size = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=size)
states, g = full(), torch.Generator().manual_seed(0)
for step in range(6):
    for micro in range(2):
        values = torch.rand(4, generator=g)
        mine = micro % size == rank
        if mine and step != 1:
            states["b"].observe("x.amax", values[0] * (float("nan") if (step, micro) == (2, 0) else 1), micro)
            states["b"].observe("w.amax", values[1], micro)
            states["b"].observe("x.mean", values[:2], micro)
            states["b"].observe("x.energy", values[2:], micro)
        if mine and micro == 0:
            states["a"].observe("x.amax", values[3], micro)  # seen by one rank only
    end_step(states, step)
torch.save(state_dict(states), sys.argv[4] + f".{{rank}}")
from lowprec.parallel import end_process, stop_world
stop_world()
end_process(0)
"""


def test_one_rank_and_two_remember_the_same(tmp_path: Path):
    """Bit-equal state on one rank, and on each of two: a layer unseen by a rank, a step without any observation and a
    NaN on one rank included."""
    script = RANKS.format(tests=str(Path(__file__).parent))

    def start(rank: int, size: int) -> subprocess.Popen[str]:
        words = [str(rank), str(size), str(tmp_path / f"rendezvous{size}"), str(tmp_path / f"s{size}")]
        return subprocess.Popen(
            [sys.executable, "-c", script, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = [start(0, 1), start(0, 2), start(1, 2)]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    one, *two = (torch.load(tmp_path / name) for name in ("s1.0", "s2.0", "s2.1"))
    for other in two:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (one["b/x.amax"] > 0).all() and one["b/x.mean"].isfinite().all(), "something was folded"
