"""bench_scaling measures what it says, and its fits are at the optimum. No time is asserted."""

import dataclasses
import json

from lowprec.tools import bench_scaling


def test_quick_rows_are_right_and_wrong_ones_are_told(capsys):
    assert bench_scaling.main(["--quick", "--json"]) == 0
    rows = [bench_scaling.Row(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert [(row.law, row.parameters) for row in rows] == [("chinchilla", 5), ("efficiency", 8)]
    assert all(row.right and row.reached > 0.9 and row.descend_ratio > 0 for row in rows)
    wrong = dataclasses.replace(rows[0], above_scipy=1e-3)
    assert not wrong.right and not dataclasses.replace(rows[0], same_samples=False).right
    text = bench_scaling.shown([wrong, rows[1]], 2)
    assert text.count("WRONG") == 1 and "target 60 s" in text
