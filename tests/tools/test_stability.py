"""Stability: the closed form of the sharpness against a search, spikes and sensitivity by hand, a grid read back."""

import json
from pathlib import Path

import pytest
import torch

from lowprec.config import to_yaml
from lowprec.launch.ladder import cells, read_ladder
from lowprec.tools.stability import main
from lowprec.train import DIVERGED
from lowprec.train.stability import lr_sensitivity, sharpness, spike_score, spikes


def test_sharpness_is_the_maximum_over_the_box() -> None:
    """No corner of the box and no random point in it is worse; a target that is left out counts nothing."""
    g = torch.Generator().manual_seed(0)
    x, target, epsilon = torch.randn(1, 6, generator=g) * 3, torch.tensor([2]), 0.05

    def f(logits: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(logits, -1) - logits[:, 2]

    reach = epsilon * (x.abs() + 1)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    inside = torch.rand(1000, 6, generator=g) * 2 - 1
    best = max(f(x + corners * reach).max(), f(x + inside * reach).max())
    phi = sharpness(x, target, epsilon)
    assert phi == pytest.approx((100 * (best - f(x)) / (1 + f(x))).item(), rel=1e-5)
    both = torch.cat([x, x * 100])
    assert sharpness(both, torch.tensor([2, -100]), epsilon) == pytest.approx(phi)
    assert sharpness(x, target, 0.0) == 0


def test_spikes_and_the_score() -> None:
    """A jump of 7 sigmas is a spike, one of 6.9 is not, NaN always is, and the first steps cannot be judged."""
    flat = [1.0, 2.0] * 20  # mean 1.5, deviation 0.5
    assert spikes([*flat, 1.5 + 7 * 0.5]) == [40] and spikes([*flat, 1.5 + 6.9 * 0.5]) == []
    assert spikes([*flat, None, float("nan"), 1.0]) == [40, 41]
    assert spikes([1.0, 1e9]) == [] and spikes([5.0] * 30 + [6.0]) == [], "no deviation, no judgement"
    assert spike_score([*flat, 100.0]) == 1 / 41 and spike_score([]) == 0
    assert spikes([*[9.0] * 50, *flat, 5.0]) == [] and spikes([*[9.0] * 50, *flat, 5.0], window=40) == [90]


def test_sensitivity_to_the_learning_rate() -> None:
    assert lr_sensitivity({1e-3: 2.0, 2e-3: 2.0}, 7.0) == 0
    assert lr_sensitivity({1e-3: 2.0, 2e-3: 3.0, 4e-3: None, 8e-3: 99.0}, 7.0) == pytest.approx((0 + 1 + 5 + 5) / 4)
    with pytest.raises(ValueError, match="at least one"):
        lr_sensitivity({}, 7.0)


def test_a_grid_is_written_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rates, two precisions, two seeds: a ladder; runs that ended, one diverged, one unfinished."""
    folder = tmp_path / "grid"
    assert main(["grid", str(folder), "recipe=nvfp4_tiny", "model.dim=64", "model.heads=2", "model.kv_heads=2",
                 "--lr", "1e-3,8e-3", "--seeds", "2", "--tokens", "4e5"]) == 0  # fmt: skip
    assert f"lowprec-sweep {folder}/ladder.yaml --dir {folder} --run" in capsys.readouterr().out
    runs, _ = cells(read_ladder(str(folder / "ladder.yaml")), folder, [], [])
    assert sorted({(c.precision, c.run.optim.lr, c.run.seed) for c in runs}) == [
        (p, lr, s) for p in ("bf16", "nvfp4") for lr in (1e-3, 8e-3) for s in (0, 1)]  # fmt: skip
    assert main(["report", str(folder)]) == 2 and "holds no run that has ended" in capsys.readouterr().err
    for cell in runs:
        hot, steps = cell.run.optim.lr == 8e-3 and cell.precision == "nvfp4", cell.steps
        fails = hot and cell.run.seed == 1
        steps = steps // 2 if cell.precision == "bf16" and cell.run.optim.lr == 8e-3 and cell.run.seed else steps
        losses = [7.0, *(4.0 + 0.1 * (i % 2) for i in range(steps - 2)), 3.5 if not hot else 3.9]
        losses[30] = 50.0 if hot and not fails else losses[30]
        cell.folder.mkdir()
        (cell.folder / "config.yaml").write_text(to_yaml(cell.run))
        (cell.folder / "exit_code").write_text(f"{DIVERGED if fails else 0 if steps == cell.steps else 75}\n")
        lines = [json.dumps({"step": i + 1, "loss": loss, "tokens_per_s": 1.0}) for i, loss in enumerate(losses)]
        (cell.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["report", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["precision"], row["lr"]): row for row in found["rows"]}
    assert rows["bf16", 8e-3]["runs"] == 1 and rows["bf16", 1e-3]["runs"] == 2
    hot = rows["nvfp4", 8e-3]
    assert (hot["diverged_frac"], hot["spiked_frac"], hot["final_loss"]) == (0.5, 1.0, 3.9)
    assert rows["nvfp4", 1e-3]["spiked_frac"] == 0 and rows["nvfp4", 1e-3]["spike_score"] == 0
    assert found["lr_sensitivity"] == {"bf16": 0.0, "nvfp4": pytest.approx(0.2)}
    assert main(["report", str(folder)]) == 0
    assert "nvfp4: sensitivity to the learning rate 0.2000 nats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["recipe=nvfp4_tiny", "--lr", "1e-3,x"], "give numbers with commas"),
        (["recipe=nvfp4_tiny", "--lr", "1e-3,1e-3"], "give different learning rates above 0"),
        (["recipe=nvfp4_tiny", "--lr", "1e-3", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["train.steps=3", "--lr", "1e-3"], "name one recipe"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path: Path, capsys, words: list[str], sentence: str) -> None:
    assert main(["grid", str(tmp_path), *words]) == 2 and sentence in capsys.readouterr().err
