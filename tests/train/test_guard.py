"""The guard judges as its rule says, acts as it is told, and decides the same when a run is started again."""

import json
from pathlib import Path

import pytest
import torch

import lowprec.train.loop as loop
from lowprec.config import GuardAction, GuardConfig
from lowprec.train import DIVERGED
from lowprec.train.guard import Diverged, Guard

CPU = torch.device("cpu")


def feed(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[str]:
    """What the guard says of each step."""
    norms = norms or [1.0] * len(losses)
    return [
        guard.judge(i + 1, torch.tensor(loss), torch.tensor(norm)).what
        for i, (loss, norm) in enumerate(zip(losses, norms))
    ]


def test_a_spike_is_judged_against_the_window() -> None:
    """Silent until the window is full; a sound step enters it, a bad one does not; the norm counts by its logarithm."""
    config = GuardConfig(on_nonfinite=GuardAction.skip, on_spike=GuardAction.skip, window=4, spike_sigmas=3.0)
    guard = Guard(config, CPU)
    assert feed(guard, [4.0, 9.0, 3.0, 4.0]) == [""] * 4
    mean, std = 5.0, torch.tensor([4.0, 9.0, 3.0, 4.0]).std(correction=0).item()
    assert feed(guard, [mean + 3.01 * std]) == ["spike"]
    assert guard.window_W2[:, 0].tolist() == [4.0, 3.0, 9.0, 4.0]
    assert feed(guard, [mean + 2.99 * std]) == [""]
    assert feed(guard, [torch.nan, 4.0], [1.0, torch.inf]) == ["not finite"] * 2
    assert feed(guard, [4.0], [1.5]) == ["spike"]
    assert guard.record() == {"guard_spikes": 2, "guard_skips": 4}


def test_by_default_the_first_bad_step_stops_the_run() -> None:
    """Nothing is read back until somebody checks; spikes are counted only."""
    guard = Guard(GuardConfig(window=2), CPU)
    assert feed(guard, [1.0, 1.0, 50.0]) == [""] * 3
    guard.check()
    assert guard.record() == {"guard_spikes": 1}
    feed(guard, [1.0, torch.nan, torch.nan])
    with pytest.raises(Diverged, match="step 2: the loss or the gradient norm is not finite"):
        guard.check()


def poison(monkeypatch: pytest.MonkeyPatch, samples: set[int]) -> None:
    """The batch that begins at any of these sequences has an infinite loss, whenever it comes."""
    real = loop.forward_backward

    def poisoned(session, batch):
        loss = real(session, batch)
        begins = session.state.loader.state_dict()["samples"] - session.run.train.global_batch
        return loss * torch.inf if begins in samples else loss

    monkeypatch.setattr(loop, "forward_backward", poisoned)


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_skip_makes_no_update(train, read, compare, monkeypatch, tmp_path: Path) -> None:
    """Step 3 (sequences 8 to 11) is not taken: the weights after it are those before; a restart decides the same."""
    assert train(tmp_path / "plain") == 0
    poison(monkeypatch, {8})
    assert train(tmp_path / "whole", "guard=skip") == 0
    plain, skipped = read(tmp_path / "plain"), read(tmp_path / "whole")
    assert skipped[2]["loss"] is None and skipped[2]["guard_skips"] == 1 and skipped[7]["guard_skips"] == 1
    assert [r["loss"] for r in skipped[:2]] == [r["loss"] for r in plain[:2]]
    assert skipped[3]["loss"] != plain[3]["loss"]
    assert [(e["step"], e["what"], e["action"]) for e in events(tmp_path / "whole")] == [(3, "not finite", "skip")]
    monkeypatch.undo()
    poison(monkeypatch, {8})
    stopping = ("guard=skip", "train.checkpoint_every=2")
    assert train(tmp_path / "again", *stopping, "train.time_limit_s=0.001") == 75
    assert train(tmp_path / "again", *stopping) == 0
    assert compare(tmp_path / "again") == compare(tmp_path / "whole")


def test_rollback_passes_over_the_data(train, read, compare, monkeypatch, tmp_path: Path) -> None:
    """Step 6 fails; the run goes back to step 4 and takes the batches of steps 7, 8, ... as its steps 5, 6, ...
    The first of those is bad too, and is passed over with what was passed over before."""
    seen: list[int] = []
    poison(monkeypatch, {20, 24})
    recorded = loop.forward_backward

    def record(session, batch):
        seen.append(session.state.loader.state_dict()["samples"] - 4)
        return recorded(session, batch)

    monkeypatch.setattr(loop, "forward_backward", record)
    assert train(tmp_path / "run", "guard=rollback", "train.checkpoint_every=2") == 0
    assert seen == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    lines = read(tmp_path / "run")
    assert [r["step"] for r in lines] == list(range(1, 9)) and lines[-1]["guard_rollbacks"] == 2
    assert [(e["step"], e["action"]) for e in events(tmp_path / "run")] == [(6, "rollback"), (5, "rollback")]


def test_rollback_gives_up(train, monkeypatch, tmp_path: Path) -> None:
    """Every batch is bad: after max_rollbacks the run ends as diverged; without a checkpoint at once."""
    poison(monkeypatch, set(range(8, 400, 4)))
    often = ("guard=rollback", "train.checkpoint_every=2", "guard.max_rollbacks=2")
    assert train(tmp_path / "a", *often) == DIVERGED
    assert len(events(tmp_path / "a")) == 2
    assert train(tmp_path / "b", "guard=rollback", "train.checkpoint_every=0") == DIVERGED


def test_raised_precision_ends(train, read, monkeypatch, tmp_path: Path) -> None:
    """After a bad step 2 the steps 3 and 4 run unquantised, as a bf16 run would from the same weights."""
    poison(monkeypatch, {4})
    plans: list[set[str]] = []
    inner = loop.forward_backward

    def record(session, batch):
        plans.append({layer.recipe.name for layer in session.plan.layers.values()})
        return inner(session, batch)

    monkeypatch.setattr(loop, "forward_backward", record)
    assert train(tmp_path / "run", "guard=raise_precision", "guard.raise_steps=2") == 0
    assert plans[2] == plans[3] == {"bf16"} and all("nvfp4" in p for i, p in enumerate(plans) if i not in (2, 3))
    assert read(tmp_path / "run")[-1]["guard_raises"] == 1
