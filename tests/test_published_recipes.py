"""Every published recipe as a file: it teaches, loads, is planned, is exact in algebra, and follows its equations."""

import dataclasses
import functools
import re

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lowprec.launch.train import compose_run
from lowprec.linear import Gemm, LinearRecipe, Operand, Plan, Policy, QuantizedLinear, load_precision, load_recipe
from lowprec.linear.cut import cut_refusal
from lowprec.linear.precision import RECIPES_FOLDER
from lowprec.linear.recipe import GEMM_OPERANDS
from lowprec.linear.state import end_step
from lowprec.model import ModelConfig, build
from lowprec.numerics import ELEMENTS, Clock, Element, Format
from lowprec.train.oscillation import refuse

NAMES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml") if not path.stem.endswith("_attention"))
LABELS = ("What it does", "What it costs", "Known to fail", "Use it")
OVERRIDE = r"(?:'precision\.[^']*'|precision\.\S+)"
T, K, N = 128, 256, 384


def text(name: str) -> str:
    return (RECIPES_FOLDER / f"{name}.yaml").read_text()


def head(name: str) -> str:
    """The comment that a file begins with."""
    return re.match(r"(?:#.*\n)*", text(name))[0]


def ablations(name: str) -> list[tuple[str, ...]]:
    """The overrides of each line below "One-line ablations"; a line that ends in a backslash goes on."""
    lines = head(name).partition("# One-line ablations")[2].replace("\\\n#", "").splitlines()[1:]
    starts = [re.match(rf"# *{OVERRIDE}(?: +{OVERRIDE})*", line) for line in lines]
    assert all(starts), f"{name}: an ablation that begins with no override"
    return [tuple(word.strip("'") for word in re.findall(OVERRIDE, start[0])) for start in starts]


ABLATIONS = [(name, overrides) for name in NAMES for overrides in ablations(name)]


@functools.cache
def wide_element() -> Element:
    """An even grid of 2^21 values."""
    return Element("wide", tuple(float(i) for i in range(2**20)))


@functools.cache
def tiny_model():
    with torch.device("meta"):
        return build(ModelConfig(vocab_size=512, dim=128, layers=6, heads=4, kv_heads=4, ffn_dim=384))


def composed(name: str, *overrides: str) -> dict:
    """The ``precision:`` node of a run after overrides."""
    run = compose_run(["recipe=bf16_tiny", f"precision={name}", *overrides], [])
    return OmegaConf.to_container(run.precision)


def overridden(name: str, overrides: tuple[str, ...]) -> dict:
    """What Hydra makes of the overrides, without composing everything else."""
    config = OmegaConf.create({"precision": OmegaConf.load(RECIPES_FOLDER / f"{name}.yaml")})
    for override in OverridesParser.create().parse_overrides([f"++{o}" for o in overrides]):
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
    return OmegaConf.to_container(config)["precision"]


# ---- the files


@pytest.mark.parametrize("name", NAMES)
def test_a_file_teaches(name):
    """Four labels in this order, a paper, short lines; the recipe of the file's name is there."""
    comment = head(name)
    places = [comment.find(f"\n# {label}: ") for label in LABELS]
    assert min(places) > 0 and places == sorted(places)
    assert re.search(r"arXiv:\d{4}\.\d{5}", comment)
    assert max(map(len, text(name).splitlines())) <= 120
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_planned(name):
    """Every layer of a small Llama on the meta device is decided by a rule, most by the file's own recipe."""
    precision = load_precision(name)
    plan = Plan.of(tiny_model(), precision)
    refuse(plan)
    own = [entry for entry in plan.entries if entry.recipe != "bf16"]
    assert len(plan.entries) == 6 * 7 + 1 and plan.entries[-1].recipe == "bf16"
    assert name == "bf16" or (own and any(entry.recipe == name for entry in own))
    assert all(line in plan.table(256) for line in precision.linear[name].describe().splitlines())


@pytest.mark.parametrize("name, overrides", ABLATIONS, ids=[f"{n}-{' '.join(o)}" for n, o in ABLATIONS])
def test_an_ablation_is_one_line(name, overrides):
    """The line of the head composes to a file that loads, is planned and is not the recipe itself."""
    changed = load_precision(overridden(name, overrides))
    assert changed != load_precision(name)
    refuse(Plan.of(tiny_model(), changed))


def test_ablations_of_nvfp4_compose_as_on_the_command_line():
    """Through launch.train, each gives the precision that the test above looked at."""
    for overrides in ablations("nvfp4")[::3]:
        assert composed("nvfp4", *overrides) == overridden("nvfp4", overrides)


def test_every_recipe_but_the_baseline_has_ablations():
    assert {name for name, _ in ABLATIONS} == set(NAMES) - {"bf16"}


# ---- algebra: with near-fp32 elements nothing but rounding errors of fp32 remains


def wide(format: Format | None, exact_scale: bool) -> Format | None:
    """The format with a grid of 2^21 values; block scales rounded as they are, guarded so that none clips."""
    if format is None:
        return None
    if exact_scale or not format.tensor_scale:
        return Format(format.name, "wide", format.block)
    return Format(
        format.name, "wide", format.block, format.scale, tensor_scale=format.tensor_scale, guard=17 / 16, zero="one"
    )


def widened(operand: Operand) -> Operand:
    """MS-EDEN rounds block scales on purpose, so its operands get fp32 ones; a mask is opened so that all pass."""
    split = operand.split
    if split is not None and hasattr(split, "format"):
        split = dataclasses.replace(split, format=wide(split.format, True))
    mask = {} if operand.gradient == "ste" else {"gradient": "clip", "clip": 2.0}
    return dataclasses.replace(operand, format=wide(operand.format, operand.rounding == "ms_eden"), split=split, **mask)


def mapped(recipe: LinearRecipe, change) -> LinearRecipe:
    """The recipe with every operand changed."""
    gemms = {role: getattr(recipe, role) for role in GEMM_OPERANDS}
    return dataclasses.replace(
        recipe, **{r: dataclasses.replace(g, a=change(g.a), b=change(g.b)) for r, g in gemms.items()}
    )


def layer_of(recipe: LinearRecipe, step: int = 600) -> QuantizedLinear:
    g = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(K, N, bias=False, recipe=recipe, clock=Clock(1), policy=Policy("oracle"))
    layer.weight.data = torch.randn(N, K, generator=g)
    layer.clock.step = step
    return layer


def passes(layer, x, dy) -> dict[str, torch.Tensor]:
    """y, dx, dw of one forward and backward."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}


def biased_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K) and dy (T, N) with a mean over tokens, so that splits have something to split."""
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(T, K, generator=g) + 3 * torch.randn(K, generator=g),
        torch.randn(T, N, generator=g) + torch.randn(N, generator=g),
    )


def exact_products(layer, x, dy) -> dict[str, torch.Tensor]:
    x, w, dy = x.double(), layer.weight.detach().double(), dy.double()
    return {"y": x @ w.T, "dx": dy @ w, "dw": dy.T @ x}


def relative_error(exact, out) -> float:
    return ((exact - out.double()).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", NAMES)
def test_near_fp32_elements_give_the_exact_products(name, monkeypatch):
    """Rotations cancel, splits add up, forward values and reused codes come back turned: < 1e-5, also in the second
    step, when histories, held maxima and moving means are filled."""
    monkeypatch.setitem(ELEMENTS, "wide", wide_element())
    layer = layer_of(mapped(load_recipe(name), widened))
    x, dy = biased_tensors()
    for step in (600, 601):
        layer.clock.step = step
        out = passes(layer, x, dy)
        for key, exact in exact_products(layer, x, dy).items():
            assert relative_error(exact, out[key]) < 1e-5, (key, step)
        end_step({"linear": layer.state}, step)


@pytest.mark.parametrize("name", NAMES)
def test_every_rotation_cancels(name):
    """Without any format the rotations alone change nothing; two rounds with signs cancel as well."""

    def bare(operand: Operand) -> Operand:
        return Operand(source="fprop") if operand.reuse or operand.source == "fprop" else Operand()

    def twice(gemm: Gemm) -> Gemm:
        turn = gemm.inner
        return (
            gemm
            if turn is None or turn.signs == "none"
            else dataclasses.replace(gemm, inner=dataclasses.replace(turn, rounds=2))
        )

    recipe = mapped(load_recipe(name), bare)
    doubled = dataclasses.replace(recipe, **{role: twice(getattr(recipe, role)) for role in GEMM_OPERANDS})
    x, dy = biased_tensors()
    for variant in (recipe, doubled):
        layer = layer_of(variant)
        out = passes(layer, x, dy)
        for key, exact in exact_products(layer, x, dy).items():
            assert relative_error(exact, out[key]) < 3e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_in_bf16_with_sizes_no_block_divides(name):
    """As in a run: bf16 activations, fp32 masters, a bias, the backend that is chosen by itself."""
    recipe = load_recipe(name)
    layer = QuantizedLinear(72, 104, recipe=recipe, clock=Clock(1, step=600))
    g = torch.Generator().manual_seed(0)
    layer.weight.data = torch.randn(104, 72, generator=g)
    x = torch.randn(3, 19, 72, generator=g).bfloat16().requires_grad_()
    dy = torch.randn(3, 19, 104, generator=g).bfloat16()
    y = layer(x)
    y.backward(dy)
    exact = exact_products(layer, x.detach().flatten(0, 1), dy.flatten(0, 1))
    out = {"y": (y - layer.bias).detach().flatten(0, 1), "dx": x.grad.flatten(0, 1), "dw": layer.weight.grad}
    bound = {"quest_w1a1": 1.0, "masked_e8m3": 0.1}.get(name, 0.65)
    for key, value in out.items():
        assert relative_error(exact[key], value) < bound, key


# ---- equations: papers restated in other words, at the recipe's own formats


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def rotated(x: torch.Tensor, n: int) -> torch.Tensor:
    """Blocks of n along the last axis."""
    return (x.unflatten(-1, (-1, n)) @ sylvester(n)).flatten(-2)


def nearest(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The nearest of +-grid."""
    return grid[(x.abs()[..., None] - grid).abs().argmin(-1)].copysign(x)


def gaussian(seed: int = 0, shape: tuple[int, int] = (64, 256)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quest(x_h: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated rows -> (levels, mask) as arXiv:2502.05003 and its code have them."""
    sigma = x_h.square().mean(-1, keepdim=True).sqrt()
    if name == "quest_fp4":
        x_q = nearest(x_h / sigma, E2M1 * 0.48707976) * sigma
        return x_q, (x_q - x_h).abs() <= 0.48707976 * sigma
    bits, alpha = {"quest_w1a1": (1, 0.79788456)}.get(name, (4, 2.51393058))
    s = alpha * sigma
    step = 2 * s / (2**bits - 1)
    x_q = (torch.round(x_h.clamp(-s, s) / step + 0.5) - 0.5) * step
    return x_q, x_h.abs() <= 1.3 * s if bits == 1 else (x_q - x_h).abs() <= sigma * alpha / (2**bits - 1)


@pytest.mark.parametrize("name", ["quest_w4a4", "quest_fp4", "quest_w1a1", "quest_w4"])
def test_quest_is_its_autograd(name):
    """Forward and both gradients against x_h * mask + stop(x_q - x_h * mask) in fp64, rotation by rotation."""
    layer = layer_of(load_recipe(name))
    dy = gaussian(1, (T, N))
    out = passes(layer, gaussian(2, (T, K)), dy)
    x = gaussian(2, (T, K)).double().requires_grad_()
    w = layer.weight.detach().double().requires_grad_()

    def quantized(t: torch.Tensor) -> torch.Tensor:
        t_h = rotated(t, 128)
        t_q, mask = quest(t_h.detach(), name)
        return t_h * mask + (t_q - t_h * mask).detach()

    y = (rotated(x, 128) if name == "quest_w4" else quantized(x)) @ quantized(w).T
    y.backward(dy.double())
    for key, reference in (("y", y.detach()), ("dx", x.grad), ("dw", w.grad)):
        assert relative_error(reference, out[key]) < 2e-3, key


@pytest.mark.parametrize("name", ["halo0_fp8", "halo1_fp8", "halo2_fp8", "halo1_int8", "halo2_int8", "halo2_fp6"])
def test_halo_places_its_rotations(name):
    """The table of arXiv:2501.02625: fprop, dgrad and wgrad of each level, written out in fp64."""
    layer = layer_of(load_recipe(name))
    x, dy = gaussian(1, (T, K)), gaussian(2, (T, N))
    out = passes(layer, x, dy)

    def q(t: torch.Tensor) -> torch.Tensor:
        grid = {"fp8": ELEMENTS["e4m3"], "int8": ELEMENTS["int8"], "fp6": ELEMENTS["e3m2"]}[name[6:]]
        scale = t.abs().max() / grid.max * (0.75 if "fp6" in name else 1)
        return grid.round((t / scale).float()).double() * scale

    level = int(name[4])
    h = sylvester(K) if level else torch.eye(K, dtype=torch.float64)
    h_t = sylvester(T) if level == 2 else torch.eye(T, dtype=torch.float64)
    x, w, dy = x.double(), layer.weight.detach().double(), dy.double()
    reference = {
        "y": q(x @ h) @ q(w @ h).T,
        "dx": h_t.T @ (q(h_t @ dy) @ q(w @ h)) @ h.T,
        "dw": q(dy).T @ q(x @ h) @ h.T,
    }
    for key in reference:
        assert relative_error(reference[key], out[key]) < 1e-3, key


def test_halo2_rescues_dx_from_an_outlier_token():
    """One token of dy x1000: spread over all tokens it no longer takes the scale of the others."""
    x, dy = gaussian(1, (T, K)), gaussian(2, (T, N))
    dy[7] *= 1000
    errors = {}
    for name in ("halo1_int8", "halo2_int8"):
        layer = layer_of(load_recipe(name))
        exact, dx = exact_products(layer, x, dy)["dx"], passes(layer, x, dy)["dx"]
        rest = torch.arange(T) != 7
        errors[name] = relative_error(exact[rest], dx[rest])
    assert errors["halo1_int8"] > 0.9


def test_quartet_scales_are_the_floored_gaussian_ones():
    """2^floor(log2(0.48707976 sigma)), sigma about the mean of 32 (arXiv:2505.14669), to nearest, clipped at 6."""
    x = gaussian().double()
    blocks = x.unflatten(1, (-1, 32))
    s = torch.exp2(torch.floor(torch.log2(0.48707976 * blocks.std(-1, correction=0, keepdim=True))))
    expected = (nearest(blocks / s, E2M1) * s).flatten(1)
    assert torch.equal(load_recipe("quartet_mxfp4").fprop.a.format.quantize(x.float()).dequantize().double(), expected)


@pytest.mark.parametrize("name", ["mxfp4_rht_sr", "quartet_mxfp4"])
def test_the_guard_of_stochastic_mxfp4(name):
    """Elements are 3/4 x / 2^(floor(log2 amax) - 2), never beyond 6; values carry the 4/3 (arXiv:2502.20586)."""
    x = gaussian()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)).clamp(1e-6, 1 - 1e-6)
    q = load_recipe(name).wgrad.a.format.quantize(x, noise)
    amax = x.unflatten(1, (-1, 32)).abs().amax(-1)
    shared = torch.exp2(torch.floor(torch.log2(amax)) - 2)
    assert torch.equal(q.scales.float(), shared)
    scaled = 0.75 * x / shared.repeat_interleave(32, 1)
    assert scaled.abs().max() <= 6
    low = E2M1[(torch.searchsorted(E2M1, scaled.abs().double(), right=True) - 1).clamp(max=6)]
    high = E2M1[(torch.searchsorted(E2M1, scaled.abs().double(), right=True)).clamp(max=7)]
    up = noise < (scaled.abs() - low) / (high - low)
    expected = torch.where(up, high, low).copysign(x) * shared.repeat_interleave(32, 1) * (4 / 3)
    torch.testing.assert_close(q.dequantize().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name, statistic", [("bitnet_158", torch.mean), ("bitnet_158_median", torch.median)])
def test_bitnet_weights_and_activations(name, statistic):
    """gamma clip(round(w / gamma), -1, 1) and int8 with 127 / max a token (arXiv:2402.17764, arXiv:2407.09527)."""
    fprop, x = load_recipe(name).fprop, gaussian()
    gamma = statistic(x.abs())
    expected = gamma * (x / gamma).round().clamp(-1, 1)
    torch.testing.assert_close(fprop.b.format.quantize(x).dequantize(), expected)
    scale = x.abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(fprop.a.format.quantize(x).dequantize(), (x / scale).round() * scale)


@pytest.mark.parametrize("bits", range(1, 8))
def test_masked_mantissas(bits):
    """bf16 with its significand rounded to `bits` mantissa bits, the exponent kept (arXiv:2405.18710)."""
    format = dataclasses.replace(load_recipe("masked_e8m3").fprop.a.format, element=f"e8m{bits}")
    x = (gaussian() * 1e-20).bfloat16().float()
    mantissa, exponent = torch.frexp(x)
    expected = torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)
    assert torch.equal(format.quantize(x.bfloat16()).dequantize(), expected)


def test_means_are_split_as_published():
    """Averis: (Q(x - mu) + Q(mu)) Q(w)^T; ours: Q(x - mu) Q(w)^T + mu w^T; both around the mean over tokens."""
    x, _ = biased_tensors()
    mu = x.mean(0, keepdim=True)
    for name in ("averis", "hp_mean"):
        layer = layer_of(load_recipe(name))
        fprop, w = layer.recipe.fprop, layer.weight.detach()
        values = [f.quantize(t).dequantize() for f, t in ((fprop.a.format, x - mu), (fprop.b.format, w))]
        mean = fprop.a.format.quantize(mu).dequantize() @ values[1].T if name == "averis" else mu @ w.T
        assert relative_error((values[0] @ values[1].T + mean).double(), layer(x).detach()) < 1e-3


def test_chon_adds_the_error_of_hot_channels():
    """Q(x) Q(w)^T + Q(m (x - Q(x))) Q(w)^T, m the 9 % of channels with most energy (arXiv:2602.02047)."""
    layer = layer_of(load_recipe("chon"))
    fprop, x = layer.recipe.fprop, gaussian(1, (T, K)) * torch.linspace(0.1, 3, K)
    x_q, w_q = fprop.a.format.quantize(x).dequantize(), fprop.b.format.quantize(layer.weight.detach()).dequantize()
    hot = torch.zeros(K).index_fill(0, x.square().sum(0).topk(24).indices, 1.0)  # 24 = ceil(0.09 * 256)
    patch = fprop.a.format.quantize((x - x_q) * hot).dequantize()
    assert relative_error(((x_q + patch) @ w_q.T).double(), layer(x).detach()) < 1e-3


ERRORS = {  # relative errors of y, dx, dw on Gaussian data, as the files' heads have them
    "nvfp4": (0.146, 0.177, 0.167),
    "quartet2": (0.123, 0.165, 0.165),
    "quartet2_hp": (0.123, 0.140, 0.140),
    "eden_46": (0.123, 0.154, 0.154),
    "lowprec_max": (0.123, 0.128, 0.128),
}


@pytest.mark.parametrize("name", ERRORS)
def test_products_have_the_stated_errors(name):
    layer, x, dy = layer_of(load_recipe(name)), gaussian(1, (T, K)), gaussian(2, (T, N))
    exact, out = exact_products(layer, x, dy), passes(layer, x, dy)
    assert [relative_error(exact[k], out[k]) for k in exact] == pytest.approx(ERRORS[name], rel=0.03)


@pytest.mark.parametrize("name", ["quartet2_hp", "lowprec_max", "mxfp4_rht_sr", "if4_eden"])
def test_gradients_are_unbiased(name):
    """The mean of 32 steps errs sqrt(32) times less: with backward operands of the original tensors, from the exact
    gradient; otherwise (if4_eden) from that of the values the forward multiplied."""
    recipe = load_recipe(name)
    layer, x, dy = layer_of(recipe), gaussian(1, (T, K)), gaussian(2, (T, N))
    exact = exact_products(layer, x, dy)
    if recipe.wgrad.b.source == "fprop":
        x_q, w_q = (
            o.format.quantize(t).dequantize().double()
            for o, t in ((recipe.fprop.a, x), (recipe.fprop.b, layer.weight.detach()))
        )
        exact |= {"dx": dy.double() @ w_q, "dw": dy.double().T @ x_q}
    total = {key: torch.zeros_like(exact[key]) for key in ("dx", "dw")}
    for step in range(32):
        layer.clock.step = step
        out = passes(layer, x, dy)
        single = {key: relative_error(exact[key], out[key]) for key in total}
        total = {key: total[key] + out[key] for key in total}
    for key in total:
        assert relative_error(exact[key], total[key] / 32) < 1.1 * single[key] / 32**0.5, key


def test_constants_of_the_papers():
    """Numbers that only a reader of the papers would miss if they changed."""
    eden, double = load_recipe("quartet2").wgrad.a, load_recipe("tetrajet_v2")
    assert (eden.format.guard, eden.format.tensor_max, eden.group) == (pytest.approx(17 / 16 * 0.93), 255.99, 128)
    assert (double.fprop.a.split.top, double.fprop.a.split.collect) == (0.1, (501, 551))
    assert double.fprop.a.format.tensor_scale == 128
    ue5m3 = load_precision("ue5m3").linear
    assert [ue5m3[r].wgrad.a.format.tensor_max for r in ("ue5m3", "ue5m3_down")] == [448, 2048]
    assert {o.window for o in (ue5m3["ue5m3"].fprop.a, ue5m3["ue5m3"].fprop.b, ue5m3["ue5m3"].dgrad.a)} == {50}
    assert load_recipe("mxfp4_rht_sr").wgrad.inner.size == 64 and load_recipe("quartet_mxfp4").wgrad.inner.size == 32
    assert load_recipe("if4_eden").fprop.a.format.tensor_max == 384
    assert load_precision("lowprec_max").deoscillation.stop == load_precision("lowprec_max").schedule[0].start == 0.82


# ---- what cannot be right is refused, and says why


EDEN = "{element: e2m1, block: [1, 16], scale: e4m3, tensor_scale: true, tensor_max: 255.99, guard: 0.988125}"
REFUSED = {
    "a rotation on one side only": (
        "{fprop: {x: {format: nvfp4, inner: {size: 16}}, w: nvfp4}}",
        r"a\.fprop\.x: unknown key 'inner'",
    ),
    "MS-EDEN without signs of the step": (
        "{wgrad: {dy: {format: nvfp4_eden, rounding: ms_eden}, x: nvfp4, inner: {size: 128, signs: fixed}}}",
        r"a\.wgrad: ms_eden is unbiased only over random rotations.*signs: step",
    ),
    "MS-EDEN without a rotation": (
        "{wgrad: {dy: {format: nvfp4_eden, rounding: ms_eden}, x: nvfp4}}",
        r"ms_eden is unbiased only over random rotations",
    ),
    "MS-EDEN on square blocks": (
        "{dgrad: {dy: nvfp4, w: {format: nvfp4_2d, rounding: ms_eden}, inner: {size: 128, signs: step}}}",
        r"ms_eden corrects the scales of 1xB blocks.*16x16",
    ),
    "a correction of less than a block": (
        "{dgrad: {dy: {format: nvfp4_eden, rounding: ms_eden, group: 24}, w: nvfp4, inner: {size: 128, signs: step}}}",
        r"groups of 24 elements",
    ),
    "stochastic rounding with 4-over-6": (
        "{dgrad: {dy: {format: nvfp4_46, rounding: stochastic}, w: nvfp4}}",
        r"stochastic rounding does not go with format nvfp4_46.*biased",
    ),
    "stochastic rounding with IF4": (
        "{dgrad: {dy: {format: if4, rounding: stochastic}, w: nvfp4}}",
        r"stochastic rounding does not go with format if4.*biased",
    ),
    "1x16 codes across a transpose": (
        "{fprop: {x: nvfp4, w: nvfp4}, dgrad: {dy: nvfp4, w: {reuse: fprop}}}",
        r"cannot be reused: dgrad contracts the other axis.*1x16",
    ),
    "row scales across a transpose": (
        "{fprop: {x: fp8_row, w: fp8_row}, wgrad: {dy: fp8_row, x: {reuse: fprop}}}",
        r"cannot be reused: wgrad contracts the other axis.*1x0",
    ),
    "stochastic codes a second time": (
        "{fprop: {x: nvfp4, w: {format: nvfp4_2d, rounding: stochastic}}, dgrad: {dy: nvfp4, w: {reuse: fprop}}}",
        r"cannot be reused.*stochastic rounding",
    ),
    "old codes under a new rotation": (
        "{fprop: {w: nvfp4_2d}, dgrad: {dy: nvfp4, w: {reuse: fprop}, inner: {size: 16}}}",
        r"cannot be reused.*not rotated for dgrad",
    ),
    "reuse with more": (
        "{fprop: {w: nvfp4_2d}, dgrad: {w: {reuse: fprop, rounding: stochastic}}}",
        r"\{reuse: fprop\} and nothing else",
    ),
    "a forward value of dy": ("{dgrad: {dy: {source: fprop}}}", r"source: fprop is for x and w of the backward"),
    "the mean over tokens of a weight": (
        "{fprop: {w: {format: nvfp4, split: {kind: mean}}}}",
        r"a weight has no token axis",
    ),
    "a gradient rule in the backward": (
        "{dgrad: {w: {format: nvfp4, gradient: trust}}}",
        r"a gradient rule belongs to the forward operand",
    ),
    "a held maximum of row scales": (
        "{fprop: {x: {format: fp8_row, amax: hold, window: 50}}}",
        r"amax: hold remembers one maximum a tensor.*fp8_row has no scale of the whole tensor",
    ),
    "a history without a length": ("{fprop: {x: {format: fp8_tensor, amax: delayed}}}", r"needs window"),
    "two rounds that undo each other": ("{fprop: {inner: {size: 16, signs: none, rounds: 2}}}", r"undo each other"),
    "a rotation of 12": ("{fprop: {inner: {size: 12}}}", r"power of two"),
    "rounding nothing": ("{fprop: {x: {rounding: stochastic}}}", r"need a format"),
}
REFUSED_FORMATS = {
    "e4m3 scales without a tensor scale": ("{element: e2m1, block: [1, 16], scale: e4m3}", r"tensor_scale"),
    "fp32 scales with one": ("{element: e2m1, block: [1, 16], tensor_scale: true}", r"belong together"),
    "a guard on a Gaussian scale": ("{element: e2m1, block: [1, 32], rule: rms, guard: 1.0625}", r"need rule absmax"),
    "power-of-two 4-over-6": ("{element: e2m1, block: [1, 32], scale: e8m0, targets: [6, 4]}", r"factor of two"),
    "a target off the grid": ("{element: e2m1, block: [1, 32], targets: [7]}", r"at most 6"),
    "a second element without a bit for it": ("{element: [e2m1, if4_int], block: [1, 16]}", r"sign bit"),
    "a double block of square blocks": (
        "{element: e2m1, block: [16, 16], scale: e4m3, tensor_scale: 128}",
        r"blocks within one row",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_right_is_refused(what):
    node, reason = REFUSED[what]
    with pytest.raises(ValueError, match=reason):
        load_precision(OmegaConf.to_container(OmegaConf.create(f"{{linear: {{a: {node}}}, rules: []}}")))


@pytest.mark.parametrize("what", REFUSED_FORMATS)
def test_a_format_that_cannot_be_right_is_refused(what):
    node, reason = REFUSED_FORMATS[what]
    with pytest.raises(ValueError, match=reason):
        load_precision(OmegaConf.to_container(OmegaConf.create(f"{{formats: {{a: {node}}}, rules: []}}")))


def test_blocks_and_rotations_that_straddle_ranks_are_named():
    """A weight (out, in) cut over tensor-parallel ranks: by 16x16 blocks, by a rotation, by a whole axis."""
    nvfp4, quartet2, halo = (load_recipe(name) for name in ("nvfp4", "quartet2", "halo1_fp8"))
    assert cut_refusal(nvfp4, 256, 256, {"out": 4}) is None and cut_refusal(nvfp4, 256, 256, {"in": 4}) is None
    assert "block of 1x16 (x of fprop)" in cut_refusal(nvfp4, 256, 96, {"in": 12})
    assert "block of 16x16 (w of fprop)" in cut_refusal(nvfp4, 96, 256, {"out": 12})
    assert "rotation of dgrad" in cut_refusal(quartet2, 256, 256, {"out": 4})
    assert "rotation of fprop" in cut_refusal(halo, 256, 256, {"in": 2})


def test_an_optional_rule_may_decide_nothing():
    """mixed_nano names Mamba's output projection, which a Llama has not; without `optional` that is an error."""
    precision = load_precision("mixed_nano")
    Plan.of(tiny_model(), precision)
    rules = tuple(dataclasses.replace(rule, optional=False) for rule in precision.rules)
    with pytest.raises(ValueError, match=r"mamba.out_proj.*decides no layer"):
        Plan.of(tiny_model(), dataclasses.replace(precision, rules=rules))
