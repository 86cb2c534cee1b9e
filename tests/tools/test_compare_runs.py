"""compare_runs: tables, equality to the last bit, plots, sentences."""

import json
from pathlib import Path

import pytest

from lowprec.tools.compare_runs import main


def run_folder(path: Path, losses: list[float], **extra: object) -> Path:
    path.mkdir()
    lines = [
        json.dumps({"step": i + 1, "tokens": 10 * (i + 1), "loss": loss, "lr": 0.1, "grad_norm": 1.0, **extra})
        for i, loss in enumerate(losses)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": ')  # and a torn line
    return path


def test_equal_runs_pass_and_the_last_bit_counts(tmp_path, capsys):
    a, b = run_folder(tmp_path / "a", [3.0, 2.0], val_loss=2.5), run_folder(tmp_path / "b", [3.0, 2.0])
    c = run_folder(tmp_path / "c", [3.0, 2.0000000000000004])
    assert main([str(a), str(b), "--assert-equal"]) == 0
    assert "2.5000" in capsys.readouterr().out
    assert main([str(a), str(b), str(c), "--assert-equal"]) == 1
    said = capsys.readouterr()
    assert "step 2: loss is 2.0 in" in said.err and "2.0000000000000004" in said.err


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'dev' brings it")
    a = run_folder(tmp_path / "a", [3.0, 2.0], val_loss=2.5)
    assert main([str(a), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_get_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "holds no metrics.jsonl" in capsys.readouterr().err
    a = run_folder(tmp_path / "a", [3.0])
    assert main([str(a), "--assert-equal"]) == 2 and "two different run folders" in capsys.readouterr().err
