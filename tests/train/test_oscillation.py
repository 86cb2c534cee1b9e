"""De-oscillation: what is measured, what is reset, on any number of ranks and across restarts."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowprec.linear import Plan, load_precision
from lowprec.linear.deoscillation import Deoscillation
from lowprec.numerics import FORMATS, Format
from lowprec.train.oscillation import Oscillation, bins_off
from tests.layouts import train_on

STEPS = 40


def oscillation(rows: int, columns: int, format: str, dtype: torch.dtype = torch.float32, **setting) -> Oscillation:
    """One layer (rows, columns) whose weight the forward product quantises, and one that is left alone."""
    model = nn.ModuleDict({"a": nn.Linear(columns, rows, bias=False), "b": nn.Linear(8, 8, bias=False)})
    fprop = {"x": "bf16", "w": format}
    rules = [{"match": "a", "recipe": "mine"}, {"match": "b", "recipe": "bf16"}]
    node = {"linear": {"mine": {"fprop": fprop}}, "rules": rules, "deoscillation": setting}
    plan = Plan.of(model, load_precision(node))
    plan.apply(model)
    return Oscillation(plan, STEPS, dtype)


def run(o: Oscillation, path: list[Tensor]) -> tuple[list[Tensor], list[dict]]:
    """Weights after each step when update s moves them by path[s + 1] - path[s], and the records."""
    weight, seen, records = o.plan.layers["a"].weight, [], []
    with torch.no_grad():
        weight.copy_(path[0])
        for step in range(len(path) - 1):
            o.before_update(step)
            weight += path[step + 1] - path[step]
            records.append(o.after_update(step))
            seen.append(weight.detach().clone())
    return seen, records


def noise(rows: int, columns: int, count: int, seed: int = 0) -> list[Tensor]:
    """A path of weights that jitter about fixed places, all of them, by amounts from tiny to large."""
    g = torch.Generator().manual_seed(seed)
    base, size = torch.randn(rows, columns, generator=g), torch.rand(rows, columns, generator=g) ** 4
    return [base + 0.3 * size * torch.randn(rows, columns, generator=g) for _ in range(count)]


def test_a_weight_that_flips_is_put_to_rest_and_others_are_not_touched():
    """int8 with bins of 1: one weight flips about 2.5, one drifts as far as its value does, one never moves, one
    moves inside its bin. Only the first is set to its value, when the window ends, and not a bit of the others."""
    o = oscillation(1, 5, "int8_row", ratio=8, start=0.0, every=10, window=4)
    path = [torch.tensor([[2.5 + 0.01 * (-1) ** s, 10.0 + s, 2.4999, 7.0 + 0.01 * (-1) ** s, 127.0]]) for s in range(5)]
    seen, records = run(o, path)
    assert records[:3] == [{}, {}, {}] and torch.equal(seen[2], path[0] + (path[3] - path[0]))
    (reset,) = records[3:]
    assert seen[3].tolist()[0][0] == 3.0, "the value it has at the end"
    assert torch.equal(seen[3][0, 1:], path[4][0, 1:])
    assert reset["osc_ratio"] == pytest.approx(1 / 5)
    assert reset["osc_mean"] == pytest.approx((4 + 4) / (0.08 + 4 + 0.08), rel=1e-4)
    assert o.tracks == {} and o.state_dict() == {}


@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d", "mxfp4", "fp8_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_definition(format: str, dtype: torch.dtype):
    """Against d_w and d_Q written out over the whole path of a window, by the format as the layer applies it."""
    first, window, ratio = 8, 6, 2.0
    o = oscillation(20, 24, format, dtype, ratio=ratio, start=0.15, every=first, window=window)
    path = noise(20, 24, first + window + 3)
    seen, records = run(o, path)
    assert [step for step, record in enumerate(records) if record] == [first + window - 1]
    weights = seen[first - 1 : first + window - 1]  # before the first update .. before the last
    before = seen[first + window - 2] + (path[first + window] - path[first + window - 1])
    weights = [*weights, before]
    values = [FORMATS[format].quantize(w.to(dtype)).dequantize() for w in weights]
    d_w = sum((b - a).abs() for a, b in pairwise(weights))
    d_q = sum((b - a).abs() for a, b in pairwise(values))
    mask = (d_w > 0) & (d_q / d_w >= ratio)
    assert 0.01 < mask.float().mean() < 0.9
    assert torch.equal(seen[first + window - 1], torch.where(mask, values[-1], before))
    assert records[first + window - 1]["osc_ratio"] == pytest.approx(mask.float().mean().item())
    assert records[first + window - 1]["osc_mean"] == pytest.approx((d_q.sum() / d_w.sum()).item(), rel=1e-5)


def test_a_sample_is_the_weights_farthest_from_their_value():
    """A quarter of every row is tracked; what is reset is what the full window resets, of those columns only."""
    setting = {"ratio": 2.0, "start": 0.0, "every": 20, "window": 6}
    path = noise(6, 32, 7)
    full, part = oscillation(6, 32, "mxfp4", **setting), oscillation(6, 32, "mxfp4", sample=0.25, **setting)
    all_of_them, _ = run(full, path)
    some, records = run(part, path)
    off = bins_off(FORMATS["mxfp4"], path[0])
    chosen = torch.zeros_like(off, dtype=torch.bool).scatter(1, off.topk(8, dim=1).indices, True)
    assert off.max() <= 0.5 + 1e-6 and off[chosen].min() > off[~chosen].mean()
    expected = torch.where(chosen, all_of_them[-1], path[0])
    for s in range(6):
        expected = expected + torch.where(chosen, 0.0, path[s + 1] - path[s])
    assert torch.equal(some[-1], expected)
    assert 0 < records[-1]["osc_ratio"] < 1 and not torch.equal(all_of_them[-1], some[-1])


def test_bins_are_those_of_the_grid():
    """e2m1 with scale 1: 0.25, 2.5 and 5 are half a bin off although the bins are 0.5, 1 and 2 wide; 1.1 is 0.2 off."""
    format = Format("f", "e2m1", (1, 8))
    off = bins_off(format, torch.tensor([[6.0, 0.25, 2.5, 5.0, 1.1, -1.1, -3.0, 0.0]]))
    torch.testing.assert_close(off, torch.tensor([[0, 0.5, 0.5, 0.5, 0.2, 0.2, 0, 0]]))
    assert torch.equal(bins_off(format, torch.zeros(1, 8)), torch.zeros(1, 8))
    one_bit = bins_off(Format("m", "midrise1", (1, 2)), torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(one_bit, torch.tensor([[0, 0.25]]))


def test_the_calendar():
    """Windows begin at multiples of `every` between start and stop and may end after stop."""
    d = Deoscillation(ratio=8, start=0.5, stop=0.8, every=10, window=4)
    windows = {step: first for step in range(40) if (first := d.window_of(step, 40)) is not None}
    assert windows == {20: 20, 21: 20, 22: 20, 23: 20, 30: 30, 31: 30, 32: 30, 33: 30}
    back_to_back = Deoscillation(start=0.0, every=3, window=3)
    assert [back_to_back.window_of(step, 9) for step in range(9)] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"ratio": 1}, "ratio must be above 1"),
        ({"start": 0.9, "stop": 0.5}, "0 <= start < stop <= 1"),
        ({"every": 10, "window": 11}, r"at most every \(10\)"),
        ({"window": 2.5}, "window is a whole number"),
        ({"sample": 0.0}, "above 0 and at most 1"),
        ({"ratio": "8"}, "ratio is a number"),
    ],
)
def test_bad_settings_are_told(bad: dict, said: str):
    with pytest.raises(ValueError, match=said):
        Deoscillation(**bad)


RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from torch.distributed.fsdp import fully_shard
from test_oscillation import noise, oscillation
from lowprec.numerics import FORMATS
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
resets = 0
for format in ("nvfp4", "nvfp4_2d", "mxfp4", "fp8_tensor", "fp8_row", "fp8_128x128"):
    for rows, sample in ((64, 1.0), (24, 1.0), (17, 0.3), (1, 1.0)):
        setting = dict(ratio=2.0, start=0.0, every=3, window=3, sample=sample)
        one, two = oscillation(rows, 24, format, **setting), oscillation(rows, 24, format, **setting)
        fully_shard(two.plan.layers["a"])
        path = noise(rows, 24, 4)
        sharded = two.plan.layers["a"].weight
        def whole(x):
            return x.full_tensor()
        with torch.no_grad():
            one.plan.layers["a"].weight.copy_(path[0])
            offset = min(dist.get_rank() * (-(-rows // 2)), rows)
            local = sharded.to_local()
            mine = slice(offset, offset + len(local))
            local.copy_(path[0][mine])
            for s in range(3):
                one.before_update(s); two.before_update(s)
                one.plan.layers["a"].weight += path[s + 1] - path[s]
                local += (path[s + 1] - path[s])[mine]
                a, b = one.after_update(s), two.after_update(s)
                assert torch.equal(whole(sharded), one.plan.layers["a"].weight), (format, rows, s)
                states = one.state_dict(), two.state_dict()
                assert states[0].keys() == states[1].keys() and len(states[0]) == (0 if a else 2 + (sample < 1))
                assert all(torch.equal(states[0][k], whole(states[1][k])) for k in states[0]), (format, rows, s)
                if s == 1:
                    two.reopen(2)
                    two.load_state_dict(states[1])
            assert a == b, (a, b)
            resets += a["osc_ratio"] > 0
assert resets > 12, resets
print("same")
from lowprec.parallel import end_process, stop_world
stop_world()
end_process(0)
"""


def test_two_ranks_reset_what_one_does(tmp_path: Path):
    """FSDP2 shards against the whole weight, bit for bit, state included: formats with a scale of the whole tensor,
    blocks that straddle shards, uneven and empty shards, samples, and a window read back half way."""
    script = RANKS.format(tests=str(Path(__file__).parent))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path / "rendezvous")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for out, err in [rank.communicate(timeout=120) for rank in ranks]:
        assert out.strip() == "same", err


SETTING = "+precision.deoscillation={ratio: 1.5, start: 0.0, every: 4, window: 3"


@pytest.mark.parametrize("sample", ["", ", sample: 0.5"])
def test_a_run_resets_says_so_and_resumes_inside_a_window(train, compare, read, tmp_path: Path, sample: str) -> None:
    """Windows end after steps 3 and 7, logged whatever log_every is; stopped after step 6 and resumed, a run gives the
    same numbers (on other ranks: test_state_resume.py); without de-oscillation it gives others."""
    options = ("train.log_every=8", "train.eval_every=0", f"{SETTING}{sample}}}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, *options) == 0
    assert [record["step"] for record in read(whole)] == [3, 7, 8]
    assert all(0 < record["osc_ratio"] < 1 and record["osc_mean"] > 0 for record in read(whole)[:2])
    assert "osc_ratio" not in read(whole)[2]

    assert train(broken, *options, "train.checkpoint_every=6") == 0
    shutil.rmtree(broken / "checkpoints" / "step_00000008")
    assert train(broken, *options) == 0
    assert compare(broken) == compare(whole)

    assert train(tmp_path / "off", *options[:2]) == 0
    assert read(tmp_path / "off")[-1]["loss"] != read(whole)[-1]["loss"]


def test_what_a_rotated_weight_would_be_set_to_is_not_guessed(train, tmp_path: Path, capsys) -> None:
    """A weight that is rotated before it is quantised has no value of its own: refused before anything is built."""
    rotated = (
        "recipe=bf16_tiny",
        "precision.linear={turned: {fprop: {x: nvfp4, w: nvfp4, inner: {size: 16, signs: fixed}}}}",
        "precision.rules=[{match: lm_head, recipe: bf16}, {match: 'layers.*', recipe: turned}]",
    )
    assert train(tmp_path, *rotated) == 0
    assert train(tmp_path / "again", *rotated, SETTING + "}") == 2
    error = capsys.readouterr().err
    assert "deoscillation: recipe turned rotates" in error and error.count("\n") == 1


def test_more_steps_may_not_move_windows_of_the_past(train, tmp_path: Path, capsys) -> None:
    """start is a share of train.steps: a run whose windows would have been elsewhere is another run."""
    options = ("schedule=constant", "train.eval_every=0", "+precision.deoscillation={start: 0.5, every: 2, window: 1}")
    assert train(tmp_path, *options) == 0
    assert train(tmp_path, *options, "train.steps=16") == 2
    assert "other learning rates or precision" in capsys.readouterr().err
    early = [o.replace("start: 0.5", "start: 0.0") for o in options]
    assert train(tmp_path / "early", *early) == 0
    assert train(tmp_path / "early", *early, "train.steps=10") == 0


@pytest.mark.distributed
def test_a_window_goes_on_under_another_layout(tmp_path: Path) -> None:
    """Saved inside a window by two shards, continued by two tensor-parallel ranks: the window ends as it would have."""
    window = "precision.deoscillation={ratio: 1.01, start: 0.0, stop: 1.0, every: 4, window: 3}"
    size = ("run.dir=run", "precision=nvfp4_deosc", window, "schedule=constant", "train.eval_every=0")
    every = "precision.rules=[{match: lm_head, recipe: bf16}, {match: '*', recipe: nvfp4_deosc}]"
    whole = train_on(2, tmp_path, *size, every, "run.dir=whole", "train.steps=3")
    train_on(2, tmp_path, *size, every, "train.checkpoint_every=1", "train.keep_last=9", "train.steps=3")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    records = train_on(2, tmp_path, *size, every, "parallel=tp", "train.steps=3")
    assert records[2]["osc_ratio"] == pytest.approx(whole[2]["osc_ratio"], abs=0.02)
    assert "begin anew" not in (tmp_path / "run.out").read_text()
