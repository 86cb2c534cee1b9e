"""Other people's tables become run tables: names are recognised, units checked, and every refusal says what to do."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.scaling.read import read, read_curve
from lowprec.scaling.sources.columns import number
from lowprec.scaling.table import RunTable
from tests.scaling.made_runs import facts, log, make_run
from tests.scaling.tables import table as published

ROWS = [{"N": 1e6 * (i + 1), "D": 2e8 * (i + 1), "loss": 3.5 - 0.1 * i} for i in range(4)]


def write(path: Path, rows: list[dict[str, Any]], mark: str = ",") -> str:
    pd.DataFrame(rows).to_csv(path, index=False, sep=mark)
    return str(path)


# ---- recognising columns


@pytest.mark.parametrize(
    "header",
    [
        "N,D,loss",
        "params,tokens,val_loss",
        "n_params,train_tokens,final_loss",
        "Num Params,Tokens-Seen,eval/loss",
        "model_size,tokens,final-val/loss",
        "config.n_params,tokens,summary.val_loss",
    ],
)
def test_names_in_common_use(tmp_path: Path, header: str) -> None:
    """Spellings do not matter."""
    path = tmp_path / "runs.csv"
    path.write_text(header + "\n1000000,200000000,3.5\n2000000,400000000,3.25\n")
    table = read([str(path)])
    assert list(table.column("N")) == [1e6, 2e6] and list(table.column("D")) == [2e8, 4e8]
    assert list(table.column("loss")) == [3.5, 3.25] and list(table.column("C")) == [1.2e15, 4.8e15]
    assert list(table.frame["run"]) == ["runs:1", "runs:2"] and set(table.frame["source"]) == {str(path)}


@pytest.mark.parametrize("mark, suffix", [(",", "csv"), ("\t", "tsv"), (";", "csv")])
def test_marks_between_cells(tmp_path: Path, mark: str, suffix: str) -> None:
    table = read([write(tmp_path / f"runs.{suffix}", ROWS, mark)])
    assert list(table.column("loss")) == [row["loss"] for row in ROWS]


def test_json_and_parquet_hold_the_same(tmp_path: Path) -> None:
    """The same runs as CSV, JSON, JSON in a wrapper, JSON Lines (torn at its end) and Parquet are the same table."""
    rows = [row | {"run": f"r{i}", "tag": "nvfp4" if i % 2 else None} for i, row in enumerate(ROWS)]
    paths = [tmp_path / name for name in ("a.csv", "a.json", "b.json", "a.jsonl", "a.parquet")]
    write(paths[0], rows)
    paths[1].write_text(json.dumps(rows))
    paths[2].write_text(json.dumps({"runs": rows}))
    paths[3].write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"N": 1')
    pd.DataFrame(rows).to_parquet(paths[4])
    frames = [read([str(path)]).frame.drop(columns="source") for path in paths]
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], check_exact=True)


def test_millions_billions_and_letters(tmp_path: Path) -> None:
    """Units in names and behind numbers."""
    rows = [{"params_M": 30, "tokens_B": 1.5, "loss": 3.0}, {"params_M": 60, "tokens_B": 3, "loss": 2.9}]
    table = read([write(tmp_path / "a.csv", rows)])
    assert list(table.column("N")) == [3e7, 6e7] and list(table.column("D")) == [1.5e9, 3e9]
    rows = [{"N": "30M", "D": "1.5B", "loss": 3.0}, {"N": "1,000,000", "D": "2e9", "loss": 2.9}]
    table = read([write(tmp_path / "b.csv", rows)])
    assert list(table.column("N")) == [3e7, 1e6] and list(table.column("D")) == [1.5e9, 2e9]


@pytest.mark.parametrize(
    "text, value", [("1e3", 1e3), ("2.5 k", 2500.0), ("7G", 7e9), ("1,234,567", 1234567.0), ("-", math.nan)]
)
def test_numbers(text: str, value: float) -> None:
    np.testing.assert_equal(number(text), value)


@pytest.mark.parametrize("text", ["1,23", "cosine", "3M5", "1e"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        number(text)


def test_a_validation_loss_is_the_loss(tmp_path: Path) -> None:
    """Beside `val_loss`, `loss` is that of training: kept under another name, and said."""
    rows = [{"N": 1e6, "D": 1e9, "loss": 2.0, "val_loss": 3.0}, {"N": 2e6, "D": 1e9, "loss": 1.9, "val_loss": 2.9}]
    table = read([write(tmp_path / "a.csv", rows)])
    assert list(table.column("loss")) == [3.0, 2.9] and list(table.frame["loss_in_source"]) == [2.0, 1.9]
    assert any("the loss is its column 'val_loss'" in note for note in table.notes)


def test_a_column_map(tmp_path: Path) -> None:
    """Names that nobody could guess; a table of the same call that has the right ones needs none."""
    odd = write(tmp_path / "a.csv", [{"size": 1e6, "toks": 1e9, "nll": 3.0}, {"size": 2e6, "toks": 1e9, "nll": 2.9}])
    plain = write(tmp_path / "b.csv", ROWS)
    table = read([odd, plain], columns={"D": "toks", "loss": "nll"})
    assert len(table) == 6 and list(table.frame["loss"][:2]) == [3.0, 2.9]


def test_two_of_n_d_and_c(tmp_path: Path) -> None:
    """The third follows from C = 6 N D, and a note says so."""
    for name, gone in (("N", "N"), ("D", "D"), ("C", "C")):
        rows = [row | {"C": 6 * row["N"] * row["D"]} for row in ROWS]
        path = write(tmp_path / f"{name}.csv", [{k: v for k, v in row.items() if k != gone} for row in rows])
        table = read([path])
        np.testing.assert_allclose(table.column(name), [row[name] for row in rows], rtol=1e-15)
        assert any(note.startswith(f"{gone} = ") for note in table.notes)


def test_rows_that_lack_something(tmp_path: Path) -> None:
    """Empty cells drop their run, with the reason; a loss that was written as nan diverged."""
    path = tmp_path / "a.csv"
    path.write_text(
        "name,N,D,loss\na,1e6,1e9,3\nb,,1e9,3\nc,1e6,,3\nd,1e6,1e9,\ne,1e6,1e9,nan\nf,1e6,0,3\ng,1e6,1e9,-1\n"
    )
    table = read([str(path)])
    assert list(table.frame["run"]) == ["a"]
    assert {lost.run: lost.reason for lost in table.dropped} == {
        "b": "it has no N",
        "c": "it has no D",
        "d": "it has no validation loss",
        "e": "diverged: loss or gradient became NaN or infinite",
        "f": "its D is 0.0",
        "g": "a loss of -1 nats cannot be",
    }


# ---- precision


def test_precision_from_what_there_is(tmp_path: Path) -> None:
    """A label, forward and backward, or bits; 16 bits everywhere, and BF16 however written, are bf16."""
    base = [{"N": 1e6, "D": 1e9, "loss": 3.0 - 0.01 * i} for i in range(3)]

    def labels(name: str, *extras: dict[str, Any]) -> list[str]:
        path = write(tmp_path / f"{name}.csv", [row | extra for row, extra in zip(base, extras)])
        return list(read([path]).frame["precision"])

    assert labels("tag", {"tag": "BF16"}, {"tag": "fp8"}, {"tag": "bfloat16"}) == ["bf16", "fp8", "bf16"]
    passes = ({"fwd": "BF16", "bwd": "BF16"}, {"fwd": "QuEST", "bwd": "BF16"}, {"fwd": "QuEST", "bwd": "SR"})
    assert labels("passes", *passes) == ["bf16", "QuEST/BF16", "QuEST/SR"]
    bits = ({"w_bits": 16, "a_bits": 16}, {"w_bits": 4, "a_bits": 16}, {"w_bits": 4, "a_bits": 4})
    assert labels("bits", *bits) == ["bf16", "w4a16", "w4a4"]


def test_a_bf16_run_labelled_as_fp8(tmp_path: Path) -> None:
    """The published mistake: a label that the bits of its own row deny."""
    rows = [
        {"run": "a", "N": 1e6, "D": 1e9, "loss": 3.0, "scheme": "fp8", "w_bits": 16, "a_bits": 16},
        {"run": "b", "N": 1e6, "D": 1e9, "loss": 3.1, "scheme": "fp8", "w_bits": 8, "a_bits": 8},
        {"run": "c", "N": 1e6, "D": 1e9, "loss": 3.2, "scheme": "bf16", "w_bits": 4, "a_bits": 16},
        {"run": "run fp8", "N": 1e6, "D": 1e9, "loss": 2.9, "scheme": "mine", "w_bits": 16, "a_bits": 16},
    ]
    table = read([write(tmp_path / "a.csv", rows)])
    assert list(table.frame["run"]) == ["b"]
    lost = {lost.run: lost.reason for lost in table.dropped}
    assert lost["a"].startswith("mislabelled: 'fp8' says fp8, but nothing in it is quantised")
    assert lost["c"].startswith("mislabelled: 'bf16' says bf16, but something in it is quantised")
    assert lost["run fp8"].startswith("mislabelled: 'run fp8' says fp8")


# ---- refusals, one sentence each


@pytest.mark.parametrize(
    "header, sentence",
    [
        (
            "N,loss",
            "has no column for D (two of N, D and C are enough): say which it is, --columns D=NAME; it has N, loss",
        ),
        ("N,D,nll", "has no column for loss: say which it is, --columns loss=NAME; it has N, D, nll"),
        ("params,n_params,D,loss", "both 'params' and 'n_params' could be N: say which, --columns N=params"),
        ("N,D,val_loss,eval_loss", "both 'val_loss' and 'eval_loss' could be loss"),
        ("N,D,tag,scheme,loss", "both 'tag' and 'scheme' could be precision"),
        ("N,D,bpb", "column 'bpb' is per byte or character, and a run table needs nats per token"),
        ("N,D,bits_per_byte", "column 'bits_per_byte' is per byte"),
        ("N,D,perplexity", "column 'perplexity' is a perplexity: give its logarithm"),
        ("N,D,D,loss", "column 'D' is there twice"),
        ("Step,d64 - val_loss,d64 - val_loss__MIN", "is the export of a chart"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, header: str, sentence: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(header + "\n" + ",".join("3" * (header.count(",") + 1)) + "\n")
    with pytest.raises(ValueError) as error:
        read([str(path)])
    assert sentence in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("a.csv", "N,D,loss\n1e6,many,3\n", "row 1: column 'D' is taken as D, but 'many' is not a number"),
        ("a.csv", "N,D,loss\n1e6,3\n", "row 1 has 2 cells and the header has 3"),
        ("a.csv", "", "it is empty"),
        ("a.csv", "N,D,loss\n", "holds no runs"),
        ("a.json", "{", "cannot be read as json"),
        ("a.json", "[1, 2]", "a table of runs is a list of objects"),
        ("a.jsonl", '{"N": 1}\nx\n{"N": 2}\n', "cannot be read as jsonl"),
        ("a.parquet", "x", "cannot be read as parquet"),
        ("a.xlsx", "x", "is not there, or no folder, .csv"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read([str(tmp_path / name)])
    assert sentence in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"columns": {"D": "toks"}}, "has no column 'toks' (--columns D=toks); it has N, tokens, loss"),
        ({"columns": {"presicion": "tag"}}, "the run table has no column 'presicion'; did you mean precision?"),
        ({"loss_unit": "bpb"}, "--loss-unit bpb: it can be nats or bits"),
        ({"n_kind": "all"}, "--n-kind all: it can be non_embedding or total"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("N,tokens,loss\n1e6,1e9,3\n")
    with pytest.raises(ValueError) as error:
        read([str(path)], **options)
    assert sentence in str(error.value)
    with pytest.raises(ValueError, match="nothing to read"):
        read([])


# ---- units and what N counts


def test_bits_become_nats(tmp_path: Path) -> None:
    """On request, by ln 2, deltas too; a name that says bits needs the request."""
    rows = [{"N": 1e6, "D": 1e9, "loss": 3.0, "delta": 0.1}]
    table = read([write(tmp_path / "a.csv", rows)], loss_unit="bits")
    assert table.frame["loss"][0] == 3.0 * math.log(2) and table.frame["delta"][0] == 0.1 * math.log(2)
    path = write(tmp_path / "b.csv", [{"N": 1e6, "D": 1e9, "loss_bits": 3.0}])
    with pytest.raises(ValueError, match="column 'loss_bits' is in bits: say --loss-unit bits"):
        read([path], columns={"loss": "loss_bits"})
    assert read([path], columns={"loss": "loss_bits"}, loss_unit="bits").frame["loss"][0] == 3.0 * math.log(2)


def test_sources_that_differ_by_the_factor_of_bits(tmp_path: Path) -> None:
    """It cannot be proven, so it is said, with the ratio; sources that agree are left in peace."""
    one = write(tmp_path / "nats.csv", ROWS)
    two = write(tmp_path / "bits.csv", [row | {"loss": row["loss"] / math.log(2) + 0.01} for row in ROWS])
    three = write(tmp_path / "like.csv", [row | {"loss": row["loss"] + 0.01} for row in ROWS])
    notes = [note for note in read([one, two]).notes if "as bits are to nats" in note]
    assert len(notes) == 1 and notes[0].startswith(f"losses of {two} are 1.4")
    assert not any("bits" in note for note in read([one, three]).notes)


def test_n_with_and_without_embeddings(tmp_path: Path) -> None:
    """Two meanings of N are not mixed; --n-kind total reconciles sources that have both."""
    make_run(tmp_path / "runs" / "a")
    whole = write(tmp_path / "whole.csv", [{"N_total": 1e6, "D": 1e9, "loss": 3.0}])
    both = write(tmp_path / "both.csv", [{"N": 8e5, "N_total": 1e6, "D": 1e9, "loss": 3.0}])
    bare = write(tmp_path / "bare.csv", [{"non_embedding_params": 8e5, "D": 1e9, "loss": 3.0}])
    unsaid = write(tmp_path / "unsaid.csv", [{"N": 8e5, "D": 1e9, "loss": 3.0}])
    runs = str(tmp_path / "runs")
    with pytest.raises(
        ValueError, match=r"N counts no embeddings in .*, and all parameters in .*: --n-kind total makes"
    ):
        read([runs, whole])
    table = read([runs, whole, both], n_kind="total")
    assert table.n_kind == "total" and sorted(table.column("N")) == [150_000, 1e6]  # whole and both are the same run
    with pytest.raises(ValueError, match="give the total for all, as column N_total, or leave one out"):
        read([bare, whole])
    with pytest.raises(ValueError, match=r"--n-kind total: .*bare.csv counts no embeddings and has no column N_total"):
        read([bare], n_kind="total")
    with pytest.raises(ValueError, match=r"whole.csv counts all parameters"):
        read([whole], n_kind="non_embedding")
    assert read([whole]).n_kind == "total" and read([both]).n_kind == "non_embedding"
    for sources, kind, meaning in (
        ([unsaid], "non_embedding", "parameters without"),
        ([unsaid, whole], "total", "all"),
    ):
        table = read(sources)
        assert table.n_kind == kind
        assert any(f"unsaid.csv does not say what N counts; it is taken as {meaning}" in note for note in table.notes)
    table = read([unsaid], n_kind="total")
    assert table.n_kind == "total" and not any("does not say" in note for note in table.notes)


def test_units_that_cannot_be(tmp_path: Path) -> None:
    """N in millions, and C that is not in FLOP, are pointed out."""
    rows = [{"N": 30, "D": 1e9, "C": 2.0, "loss": 3.0}, {"N": 60, "D": 1e9, "C": 4.0, "loss": 2.9}]
    notes = read([write(tmp_path / "a.csv", rows)]).notes
    assert any("N is at most 60: check its unit" in note for note in notes)
    assert any("times 6 N D in the middle" in note for note in notes)


# ---- whole curves


def curve_rows() -> list[dict[str, Any]]:
    return [
        {"size_M": size, "schedule": shape, "step": step, "lr": 3e-4 / step, "loss": 10 / size + 3 / step}
        for size in (25, 100)
        for shape in ("cosine", "wsd")
        for step in range(1, 6)
    ]


def test_a_table_of_curves(tmp_path: Path) -> None:
    """One row a curve: its last loss, its peak learning rate, and the way back to it."""
    rows = curve_rows()
    path = write(tmp_path / "curves.csv", rows[:10] + rows[14:9:-1] + rows[15:])  # one of them backwards
    table = read([path])
    assert list(table.frame["run"]) == ["25/cosine", "25/wsd", "100/cosine", "100/wsd"]
    assert list(table.column("N")) == [2.5e7, 2.5e7, 1e8, 1e8] and table.frame["loss"][0] == 10 / 25 + 3 / 5
    assert table.frame["loss"][2] == 10 / 100 + 3 / 5
    assert set(table.frame["lr"]) == {3e-4} and list(table.frame["schedule"]) == ["cosine", "wsd"] * 2
    curve = read_curve(table.frame["curve"][2])
    assert list(curve.columns) == ["step", "lr", "loss", "val_loss"] and list(curve["step"]) == [1, 2, 3, 4, 5]
    assert list(curve["loss"]) == [row["loss"] for row in curve_rows()[10:15]]
    with pytest.raises(ValueError, match="has no run '400/wsd'"):
        read_curve(f"{path}#400/wsd")
    with pytest.raises(ValueError, match="there is no curve at"):
        read_curve(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="holds whole curves"):
        read([path], loss_unit="bits")


# ---- there and back, and in any order


def test_round_trip(tmp_path: Path) -> None:
    """A mixed table, written and read, is the same to the last bit, with the same fingerprint."""
    make_run(tmp_path / "runs" / "a", facts("nvfp4"), log(level=2.3456789012345))
    make_run(tmp_path / "runs" / "b", facts(plan="149681995393", data=facts()["data"] | {"hash": "12e4567890123456"}))
    rows = [row | {"tag": "fp8", "note": "x, y", "code": "007", "x": 0.1 + 0.2} for row in ROWS]
    table = read([str(tmp_path / "runs"), write(tmp_path / "a.csv", rows), write(tmp_path / "c.csv", curve_rows())])
    table.to_csv(tmp_path / "out.csv")
    again = read([str(tmp_path / "out.csv")])
    pd.testing.assert_frame_equal(again.frame, table.frame, check_exact=True)
    assert again.fingerprint() == table.fingerprint() and again.n_kind == table.n_kind and not again.dropped
    row = again.frame.set_index("run").loc["b"]
    assert row["plan"] == "149681995393" and row["data"].startswith("12e4567890123456 ")
    whole = read([str(tmp_path / "runs")], n_kind="total")
    whole.to_csv(tmp_path / "whole.csv")
    assert read([str(tmp_path / "whole.csv")]).n_kind == "total"


finite = st.floats(1e3, 1e12, allow_nan=False, allow_infinity=False)
label = st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), min_size=1, max_size=8))
run_rows = st.lists(
    st.fixed_dictionaries(
        {"N": finite, "D": finite, "loss": st.floats(0.1, 10), "seed": st.one_of(st.none(), st.integers(0, 9))}
        | {"precision": label, "data": label, "mine": label, "other": st.one_of(st.none(), st.floats(allow_nan=False))}
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda row: (row["N"], row["D"], row["loss"]),
)


@settings(max_examples=15)
@given(run_rows, st.randoms(use_true_random=False))
def test_any_table_survives_and_order_does_not_matter(rows: list[dict[str, Any]], random: Any) -> None:
    """Written and read it is the same; its rows shuffled and dealt to two files, in either order, it is the same."""
    import tempfile

    rows = [row | {"run": f"r{i}", "source": "s"} for i, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:

        def table(name: str, part: list[dict[str, Any]]) -> str:
            path = Path(folder, name)
            path.write_text(json.dumps(part))
            return str(path)

        whole = read([table("a.json", rows)])
        whole.to_csv(Path(folder, "b.csv"))
        again = read([str(Path(folder, "b.csv"))])
        pd.testing.assert_frame_equal(again.frame, whole.frame, check_exact=True)
        shuffled = random.sample(rows, len(rows))
        cut = random.randint(0, len(rows))
        parts = [part for part in (shuffled[:cut], shuffled[cut:]) if part]
        paths = [table(f"{i}.json", part) for i, part in enumerate(parts)]
        for order in (paths, paths[::-1]):
            assert_same_rows(read(order), whole)


def assert_same_rows(one: RunTable, two: RunTable) -> None:
    frames = [table.frame.sort_values("run").reset_index(drop=True) for table in (one, two)]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    assert one.fingerprint() == two.fingerprint()
    assert {(lost.run, lost.reason) for lost in one.dropped} == {(lost.run, lost.reason) for lost in two.dropped}


def test_sources_in_any_order(tmp_path: Path) -> None:
    """Folders, a table and a copy of a run in both: the same rows, and the same choice between the copies."""
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "more" / "b", facts("nvfp4"))
    table = read([str(tmp_path / "runs"), str(tmp_path / "more")])
    table.to_csv(tmp_path / "t.csv")
    sources = [str(tmp_path / name) for name in ("runs", "more", "t.csv")]
    both = read(sources)
    pd.testing.assert_frame_equal(both.frame, table.frame)
    assert len(both.dropped) == 2 and all("the same numbers" in lost.reason for lost in both.dropped)
    assert_same_rows(read(sources[::-1]), both)


# ---- tables that were published


def test_published_tables() -> None:
    """Each is read without options, whole."""
    expected = {
        "chinchilla_epoch.csv": (245, {"C"}),
        "quest_runs.csv": (104, {"bits_w", "bits_a", "precision", "seed", "schedule", "data"}),
        "quartet_mxfp4_runs.csv": (174, {"fwd", "bwd", "precision"}),
        "infatoshi_nvfp4_smallruns.csv": (40, {"precision", "backend"}),
    }
    for name, (count, columns) in expected.items():
        table = read([str(published(name))])
        assert (
            len(table) == count and not table.dropped and {"N", "D", "C", "loss", *columns} <= set(table.frame.columns)
        )
    quartet = read([str(published("quartet_mxfp4_runs.csv"))]).frame
    assert set(quartet["precision"][quartet["fwd"] == "BF16"]) >= {"bf16"}
    assert ((quartet["fwd"] == "BF16") & (quartet["bwd"] == "BF16")).equals(quartet["precision"] == "bf16")
    curves = read([str(published("mpl_loss_curves.csv"))])
    assert len(curves) == 27 and len(read_curve(curves.frame["curve"][0])) > 100
