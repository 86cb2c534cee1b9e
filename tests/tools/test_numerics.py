"""lowprec-numerics: right references, the operands that products see, tables, page, sentences for mistakes."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowprec.launch.train import main as train
from lowprec.linear import BF16, load_precision, load_recipe
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.numerics import FORMATS, fixed_signs, rotate, sqnr_db
from lowprec.tools import numerics
from lowprec.tools.numerics_data import KINDS, Tensors, draw
from lowprec.tools.numerics_measure import Row, layer_of, measure, seen, step

ROOT = Path(numerics.__file__).resolve().parent.parent
SHAPE = (256, 128, 192)


def rows_of(name: str, kind: str, shape: tuple[int, int, int] = SHAPE) -> dict[str, Row]:
    rows = measure(name, load_recipe(name), kind, lambda index: draw(kind, shape, seed=index), backend="torch")
    return {row.gemm: row for row in rows}


def test_the_exact_products_are_those_of_autograd() -> None:
    """In fp32 without quantisation all three products agree with fp64 to fp32's precision: no transpose is mixed up."""
    rows = measure("bf16", BF16, "gaussian", lambda index: draw("gaussian", SHAPE, dtype=torch.float32))
    assert all(row.sqnr_db > 120 and row.row_sqnr_db > 120 and abs(row.bias) < 1e-6 for row in rows)


def test_operands_are_those_of_the_product() -> None:
    """nvfp4's x: the forward's is the plain codes, wgrad's is transposed and rotated first, as its formula says."""
    t = draw("gaussian", SHAPE)
    layer = layer_of(load_recipe("nvfp4"), t, "torch")
    forward, weight = seen(layer, t, "fprop", "a"), seen(layer, t, "wgrad", "b")
    assert torch.equal(forward.exact, t.x_TK.float())
    assert torch.equal(forward.rounded, FORMATS["nvfp4"].quantize(t.x_TK).dequantize())
    rotated = rotate(t.x_TK.T, 16, fixed_signs(16))
    assert torch.equal(weight.exact, rotated.float())
    assert torch.equal(weight.rounded, FORMATS["nvfp4"].quantize(rotated).dequantize())


@pytest.mark.parametrize("name", ["nvfp4_4over6", "quartet2", "if4_eden", "tetrajet_v2", "fp8_delayed", "ue5m3"])
def test_rounded_operands_give_the_products(name: str) -> None:
    """Rotations, forward values, splits, tensor scales: each product is that of what its operands are rounded to."""
    recipe, t = load_recipe(name), draw("outlier_channels", SHAPE)
    layer = layer_of(recipe, t, "torch")
    got = step(layer, t)
    for role in GEMM_OPERANDS:
        a, b = (seen(layer, t, role, side).rounded.double() for side in ("a", "b"))
        assert sqnr_db(a @ b.T, got[role]) > 45, role  # dx and y are rounded to bf16, which is at 55 dB


@pytest.mark.parametrize("name", ["averis", "halo2_int8", "quest_w4a4"])
def test_rounded_operands_give_the_forward_product(name: str) -> None:
    """Where a backward product adds terms, masks gradients or turns its output, the forward's still is the product."""
    t = draw("channel_means", SHAPE)
    layer = layer_of(load_recipe(name), t, "torch")
    x, w = (seen(layer, t, "fprop", side).rounded.double() for side in ("a", "b"))
    assert sqnr_db(x @ w.T, step(layer, t)["fprop"]) > 45


def test_underflow_saturation_and_bias_by_hand() -> None:
    """INT8 with one scale: a value 1000 times the others makes them zero, and nothing saturates."""
    x = torch.ones(16, 16)
    x[0, 0] = 1000
    t = Tensors(x, torch.eye(16), torch.ones(16, 16))
    node = {"linear": {"int8": {"fprop": {"x": "int8_tensor", "w": "int8_tensor"}}}, "rules": []}
    recipe = load_precision(node).linear["int8"]
    row = next(iter(measure("int8", recipe, "mine", lambda index: t, backend="torch")))
    a = row.operands[0]
    assert (a.name, a.underflow_frac, a.saturation_frac) == ("x", 255 / 256, 0.0)
    assert a.bias == pytest.approx(255 / (255 + 1e6), abs=2**-22)  # of fp32's 1000


def test_halo2_recovers_dx_from_an_outlier_token() -> None:
    """arXiv:2501.02625: one large token in dy takes the scale of the tensor; rotating the tokens gives dx back."""
    one, two = (rows_of(name, "outlier_tokens")["dgrad"] for name in ("halo1_int8", "halo2_int8"))
    assert two.sqnr_db > one.sqnr_db + 12
    assert two.row_sqnr_db > one.row_sqnr_db + 12 and one.row_sqnr_db < 6  # without it ordinary tokens are lost
    assert one.operands[0].underflow_frac > 0.5 > two.operands[0].underflow_frac


def test_splitting_the_mean_off_pays_where_channels_have_one() -> None:
    """arXiv:2603.10444: y with the mean apart is better by 2 dB and more, exact by more than quantised; and no worse
    where there is no mean."""
    plain, averis, exact = (rows_of(name, "channel_means") for name in ("fp4_all_the_way", "averis", "hp_mean"))
    assert averis["fprop"].sqnr_db > plain["fprop"].sqnr_db + 2
    assert exact["fprop"].sqnr_db > averis["fprop"].sqnr_db + 2
    assert exact["wgrad"].sqnr_db > averis["wgrad"].sqnr_db + 6
    without, apart = (rows_of(name, "gaussian")["fprop"].sqnr_db for name in ("fp4_all_the_way", "averis"))
    assert abs(without - apart) < 0.3


def test_a_recipe_that_remembers_is_measured_with_a_past() -> None:
    """Delayed scales come from other draws: as good as current ones, within what the draws differ, but not the same."""
    delayed, current = rows_of("fp8_delayed", "gaussian"), rows_of("fp8_tensorwise", "gaussian")
    for gemm, row in delayed.items():
        assert 0 < abs(row.sqnr_db - current[gemm].sqnr_db) < 1


def test_every_shipped_recipe_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """--json: three rows for each recipe of each file, finite, at most as good as bf16, and worse if quantised."""
    assert numerics.main(["--quick", "--backend", "torch", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["recipe"].partition(":")[0] for row in rows} == set(numerics.shipped())
    by_recipe: dict[str, list[dict]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)
    for name, three in by_recipe.items():
        assert [row["gemm"] for row in three] == ["fprop", "dgrad", "wgrad"], name
        for row in three:
            assert math.isfinite(row["sqnr_db"]) and 0 < row["sqnr_db"] < 60, (name, row)
            quantised = [o for o in row["operands"] if o["bits"] < 16]
            assert all(o["sqnr_db"] is not None and 0 <= o["underflow_frac"] < 1 for o in quantised), (name, row)
            assert bool(quantised) <= (row["sqnr_db"] < 54), (name, row)
            assert row["cost"]["bits"][f"{row['gemm']}.{row['operands'][0]['name']}"] == row["operands"][0]["bits"]


def test_runs_as_a_script() -> None:
    """`python tools/numerics.py` prints the table of errors and the table of costs."""
    words = ["tools/numerics.py", "--quick", "--recipes", "mxfp8,nvfp4", "--threads", "1", "--backend", "torch"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^nvfp4 +fprop +1\d\.\d", done.stdout, flags=re.M)
    assert "amax passes" in done.stdout


def test_the_page_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--html: one file with a plot of errors and one of bits for each kind of data, tables, equations, no links."""
    pytest.importorskip("matplotlib", reason="the extra 'dev' brings it")
    page = tmp_path / "page.html"
    words = ["--quick", "--recipes", "nvfp4", "mxfp8", "--data", "gaussian,outlier_tokens", "--html", str(page)]
    assert numerics.main([*words, "--backend", "torch"]) == 0
    text = page.read_text()
    assert text.count('src="data:image/png;base64,') == 4 and text.count("<table>") == 3
    assert "<td>mxfp8</td>" in text and "dw = dy^T x" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text


def test_without_matplotlib_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The page is refused before anything is measured, and the sentence says how to install what is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(numerics, "collect", lambda *_: pytest.fail("measured first"))
    assert numerics.main(["--html", str(tmp_path / "page.html")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_tensors_of_a_run(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--capture: the layers that match are measured under any recipe."""
    assert train(["recipe=nvfp4_tiny", f"run.dir={tmp_path}", *settings]) == 0
    capsys.readouterr()
    words = ["--capture", str(tmp_path), "--layers", "layers.1.mlp.*", "--recipes", "mxfp8", "--tokens", "64", "--json"]
    assert numerics.main([*words, "--backend", "torch"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["data"] for row in rows} == {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert all(20 < row["sqnr_db"] < 40 for row in rows)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--recipes", "nvfp5"], "recipe nvfp5: precision: unknown precision recipe 'nvfp5'; did you mean 'nvfp4'"),
        (["--data", "gauss"], "unknown data 'gauss'; choose one of gaussian, student_t"),
        (["--capture", "no_such_folder"], "holds no config.yaml"),
        (["--recipes", "bad.yaml"], "recipe bad: "),
    ],
)
def test_mistakes_get_a_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the recipe, data or folder."""
    assert numerics.main(["--quick", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_data_is_as_described(kind: str) -> None:
    """Each kind has its property and no other, and the same tensors come on every call."""
    shape = (1024, 256, 128)
    t, again, other = draw(kind, shape), draw(kind, shape), draw(kind, shape, seed=1)
    assert torch.equal(t.x_TK, again.x_TK) and not torch.equal(t.x_TK, other.x_TK)
    x = t.x_TK.float()
    large = {axis: int((x.abs().median(dim).values > 10).sum()) for axis, dim in (("tokens", 1), ("channels", 0))}
    means = int((x.mean(0).abs() > 10).sum())
    kurtosis = float((x**4).mean() / x.square().mean() ** 2)
    expected = {"outlier_channels": (0, 4, 0), "outlier_tokens": (4, 0, 0), "channel_means": (0, 5, 5)}
    assert (large["tokens"], large["channels"], means) == expected.get(kind, (0, 0, 0))
    assert (kurtosis > 10) == (kind != "gaussian")
    assert t.w_NK.float().std().item() == pytest.approx(256**-0.5, rel=0.02)
