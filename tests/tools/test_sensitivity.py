"""sensitivity: each measure is its definition, the layer made worst comes first, the rules do what they say."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lowprec.linear import Gemm, LinearRecipe, Operand, Plan, Rotation, load_precision, load_recipe
from lowprec.linear.split import MeanSplit
from lowprec.model import cross_entropy
from lowprec.numerics import FORMATS, fixed_signs, rotate
from lowprec.tools.capture import Captured, Loaded, open_recipe
from lowprec.tools.sensitivity import (
    METRICS,
    Row,
    main,
    measure,
    order,
    ranks,
    rules,
    rules_text,
    spearman,
    worst,
)
from lowprec.tools.sensitivity_measures import (
    fisher,
    hessian_traces,
    mean_loss,
    output_errors,
    unquantised_losses,
    weight_error,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def loaded(settings: list[str]) -> Loaded:
    return open_recipe("nvfp4_tiny", settings)


# ---- measures


def test_trace_of_a_diagonal_hessian_is_exact() -> None:
    """Random signs square to one: v^T diag(a) v is the trace whatever v is, so there is no error at all."""
    a, w = normal(3, 4).abs(), normal(3, 4, seed=1).requires_grad_()
    trace, error = hessian_traces([lambda: (a * w.square()).sum() / 2], {"w": w}, 2)["w"]
    assert trace == pytest.approx(float(a.sum()), rel=1e-6) and error < 1e-6


def test_trace_of_one_layer_is_that_of_its_exact_hessian() -> None:
    """Softmax regression: within 3 sigma of torch's full Hessian; sigma from the Hessian itself, 2 |offdiagonal|^2."""
    x, targets, w = normal(32, 5), torch.arange(32) % 3, normal(3, 5, seed=1).requires_grad_()

    def loss(weight: Tensor = w) -> Tensor:
        return F.cross_entropy(x @ weight.T, targets)

    hessian = torch.autograd.functional.hessian(loss, w).reshape(15, 15)
    sigma = math.sqrt(2 * float((hessian - hessian.diag().diag()).square().sum()) / 64)
    trace, error = hessian_traces([loss], {"w": w}, 64)["w"]
    assert abs(trace - float(hessian.trace())) < 3 * sigma
    assert 0.5 * sigma < error < 2 * sigma


def test_each_weight_gets_the_trace_of_its_own_block() -> None:
    """A strong coupling of two weights (its block has a trace of its own) does not enter."""
    u, w = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()

    def loss() -> Tensor:
        return 1.5 * u.square().sum() + 0.5 * w.square().sum() + 100 * (u * w).sum()

    traces = hessian_traces([loss], {"u": u, "w": w}, 3)
    assert (traces["u"][0], traces["w"][0]) == (pytest.approx(12), pytest.approx(4))


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    """Three linear losses whose gradients are known: (1 + 9 + 4) / 3 and (0 + 16 + 1) / 3."""
    w = torch.zeros(2, requires_grad=True)
    losses = [partial(torch.dot, torch.tensor(g), w) for g in ([1.0, 0.0], [-3.0, 4.0], [2.0, 1.0])]
    assert torch.allclose(fisher(losses, {"w": w})["w"], torch.tensor([14 / 3, 17 / 3]))


def test_weight_error_is_that_of_the_format() -> None:
    """Q(w) - w is what the format's own quantize and dequantize give; rotated, it has the rotated weight's norm."""
    w_NK = normal(48, 64).bfloat16()
    expected = FORMATS["nvfp4_2d"].quantize(w_NK).dequantize() - w_NK.float()
    assert torch.allclose(weight_error(w_NK, load_recipe("nvfp4"), "layer"), expected, atol=1e-6)
    assert not weight_error(w_NK, LinearRecipe("none"), "layer").any()

    f = FORMATS["nvfp4"]
    turned_NK = rotate(w_NK.float(), 16, fixed_signs(16))
    turned = LinearRecipe("turned", fprop=Gemm(Operand(f), Operand(f), Rotation(16, "fixed")))
    error = f.quantize(turned_NK).dequantize() - turned_NK
    assert weight_error(w_NK.float(), turned, "layer").norm() == pytest.approx(float(error.norm()), rel=1e-4)


def test_output_errors_by_hand() -> None:
    """The forward error from dequantised operands in fp64; 0 for products that the recipe leaves alone."""
    c, f = Captured(normal(32, 64).bfloat16(), normal(48, 64, seed=1).bfloat16(), normal(32, 48, seed=2).bfloat16()), {}
    f["x"], f["w"] = (
        FORMATS[name].quantize(t).dequantize().double() for name, t in (("mxfp4", c.x_TK), ("fp8_row", c.w_NK))
    )
    recipe = LinearRecipe("forward", fprop=Gemm(Operand(FORMATS["mxfp4"]), Operand(FORMATS["fp8_row"])))
    y, yq = c.x_TK.double() @ c.w_NK.double().T, f["x"] @ f["w"].T
    errors = output_errors(c, recipe, "layer")
    assert errors["fprop"] == pytest.approx(float((y - yq).square().sum() / y.square().sum()), rel=1e-4)
    assert errors["dgrad"] == errors["wgrad"] == 0.0
    assert all(0.005 < error < 0.1 for error in output_errors(c, load_recipe("nvfp4"), "layer").values())


def test_a_recipe_that_remembers_has_seen_the_tensors() -> None:
    """With maxima delayed by a step its errors are those of current maxima: the history is of these very tensors."""
    c = Captured(normal(32, 64), normal(48, 64, seed=1), normal(32, 48, seed=2))

    def forward(operand: Operand) -> float:
        return output_errors(c, LinearRecipe("r", fprop=Gemm(operand, Operand(FORMATS["nvfp4_2d"]))), "layer")["fprop"]

    nvfp4 = FORMATS["nvfp4"]
    assert forward(Operand(nvfp4, amax="delayed", window=2)) == forward(Operand(nvfp4))
    ema = forward(Operand(nvfp4, split=MeanSplit("quantized", "ema", 0.9)))
    assert ema == forward(Operand(nvfp4, split=MeanSplit("quantized", "batch"))) != forward(Operand(nvfp4))


def test_the_model_is_differentiated_twice(loaded: Loaded) -> None:
    """H v through the whole model, attention included, is the difference of gradients; its loss is training's."""
    weights = {name: layer.weight for name, layer in loaded.layers("layers.0.attn.*").items()}
    with unquantised_losses(loaded, 1) as (loss,):
        micro = loaded.micros(1)[0]
        total, _ = cross_entropy(loaded.forward(micro), micro.batch.targets)
        assert mean_loss(loaded, micro).item() == pytest.approx(total.item() / int((micro.batch.targets >= 0).sum()))
        for weight in weights.values():
            v = normal(*weight.shape)
            (gradient,) = torch.autograd.grad(loss(), weight, create_graph=True)
            (hv,) = torch.autograd.grad(gradient, weight, v)
            eps, sides = 1e-3, []
            for shift in (eps, -2 * eps):
                weight.data += shift * v
                sides.append(torch.autograd.grad(loss(), weight)[0])
            weight.data += eps * v
            assert ((sides[0] - sides[1]) / (2 * eps) - hv).norm() < 0.02 * hv.norm()
    assert loaded.model.dtype == torch.bfloat16


# ---- ranking


def test_the_layer_that_is_made_worst_comes_first(loaded: Loaded) -> None:
    """Huge weights where the input is zero change nothing in the model, but take the whole range of every block."""
    block = loaded.model.layers[1]
    with torch.no_grad():
        block.attn_norm.weight[::16] = 0.0
        block.attn.v_proj.weight[:, ::16] = 20.0
    rows = measure(loaded, load_precision("nvfp4"), probes=8, batches=2)
    assert len(rows) == 14 and {row.parameters for row in rows} == {64 * 64, 64 * 128}
    for by in ("fprop", "fisher", "hessian", "rank"):
        assert order(rows, by)[0].layer == "layers.1.attn.v_proj", by
    first, second = order(rows, "fprop")[:2]
    assert first.fprop > 10 * second.fprop
    w_NK = block.attn.v_proj.weight.detach().bfloat16()
    square = (FORMATS["nvfp4_2d"].quantize(w_NK).dequantize() - w_NK.float()).square().sum()
    assert first.hessian == pytest.approx(first.trace / w_NK.numel() * float(square), rel=1e-3)


def test_ranks_and_spearman() -> None:
    """1 is the largest, ties share; the textbook value 1 - 6 sum d^2 / (n (n^2 - 1)) without ties."""
    assert ranks([3.0, 9.0, 3.0, 1.0]) == [2.5, 1.0, 2.5, 4.0]
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 2, 3], [7, 7, 7]) is None


def test_rank_gives_the_three_measures_equal_weight() -> None:
    """The three products together weigh as much as Fisher, and as the Hessian."""

    def row(name: str, *values: float) -> Row:
        return Row(name, 1, *values, trace=0.0, trace_error=0.0)

    rows = [row("products", 9, 9, 9, 1, 1), row("derivatives", 1, 1, 1, 9, 9)]
    assert [r.layer for r in order(rows, "rank")] == ["derivatives", "products"]
    assert [r.layer for r in order(rows, "wgrad")] == ["products", "derivatives"]


# ---- rules


@pytest.mark.parametrize("match", ["layers.*", "*", "layers.{last:1}.*"])
@pytest.mark.parametrize("keep", [0, 15, 40, 100])
def test_rules_keep_exactly_the_worst(loaded: Loaded, match: str, keep: float) -> None:
    """The plan reads them: the kept layers and those not judged are in bf16, all others in the default recipe."""
    names, r = list(loaded.plan.layers), torch.Generator().manual_seed(1)
    judged = loaded.layers(match)
    drawn = torch.rand(len(judged), 5, generator=r).tolist()
    rows = order([Row(n, judged[n].weight.numel(), *v, 0.0, 0.0) for n, v in zip(judged, drawn)], "rank")
    kept = worst(rows, keep)
    total = sum(row.parameters for row in rows)
    assert sum(row.parameters for row in kept) >= total * keep / 100
    assert not kept or sum(row.parameters for row in kept[:-1]) < total * keep / 100

    file = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "precision" / "nvfp4.yaml").read_text())
    file["rules"] = yaml.safe_load(rules_text(rules(kept, rows, match, names)))["rules"]
    decided = {entry.layer: entry.recipe for entry in Plan.of(loaded.model, load_precision(file)).entries}
    high = {row.layer for row in kept} | set(names) - set(judged)
    assert decided == {name: "bf16" if name in high else "nvfp4" for name in names}


# ---- command


def test_command_prints_tables_and_rules(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints ends in YAML rules; --json says the same in numbers."""
    words = ["--recipe", "bf16_tiny", "--precision", "mxfp8", "--probes", "2", "--batches", "1", "--by", "fisher"]
    assert main([*words, "--set", *settings]) == 0
    text = capsys.readouterr().out
    assert "mxfp8 on bf16_tiny after 0 steps, worst first by fisher" in text and "spearman" in text
    assert main([*words, "--json", "--set", *settings]) == 0
    said = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(text[text.index("\nrules:") :])["rules"] == said["rules"]
    assert [row["layer"] for row in said["layers"]] == [r.layer for r in order(_rows(said), "fisher")]
    assert all(said["spearman"][metric][metric] == pytest.approx(1) for metric in METRICS)
    assert 15 <= said["kept_percent"] < 30


def _rows(said: dict) -> list[Row]:
    return [Row(**{key: value for key, value in row.items() if key != "rank"}) for row in said["layers"]]


def test_mistakes_get_a_sentence(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line for a source, a precision or a layer that is not there."""
    for words, sentence in (
        ([], "give either the folder of a run or --recipe NAME"),
        ([str(tmp_path)], "holds no config.yaml"),
        ([str(tmp_path), "--set", "seed=1"], "--set goes with --recipe"),
        (["--recipe", "nvfp4_tiny", "--step", "3"], "--step goes with a run"),
        (["--recipe", "nvfp4_tiny", "--precision", "nvfp5"], "did you mean 'nvfp4'"),
        (["--recipe", "bf16_tiny", "--set", *settings], "there is nothing to judge: give --precision"),
        (["--recipe", "nvfp4_tiny", "--match", "layer", "--set", *settings], "no linear layer matches 'layer'"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
