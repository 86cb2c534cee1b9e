"""The check before training: sound backends pass it, and every way of being wrong stops the run with one sentence."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowprec.launch.train import main
from lowprec.linear import Plan, backends, load_precision, oracle, verify
from lowprec.linear.backends import Torch, choose
from lowprec.linear.verify import ROWS, TOKENS, cases
from lowprec.numerics import Stream
from tests.ranks import run

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
LAYER = r"layer 'up' \(96, 64\), "
FIX = r"; train with precision.backend=torch$"


def forget() -> None:
    choose.cache_clear()
    verify._found.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


def planned(precision: str, backend: str = "torch", shape: tuple[int, int] = (64, 96)) -> Plan:
    model = nn.ModuleDict({"up": nn.Linear(*shape, bias=False), "down": nn.Linear(shape[1], shape[0], bias=False)})
    node = {**_read(precision), "backend": backend, "rules": [{"match": "*", "recipe": "default"}]}
    plan = Plan.of(model, load_precision(node), seed=3)
    plan.apply(model)
    return plan


def _read(name: str) -> dict[str, Any]:
    import yaml

    from lowprec.linear.precision import RECIPES_FOLDER

    node = yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text())
    return {key: node[key] for key in ("formats", "linear") if key in node}


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "fp8_delayed", "halo1_int8", "quartet2", "tetrajet_v2", "chon"])
@pytest.mark.parametrize("backend", ["auto", "cpu_portable", "torch"])
def test_the_shipped_backends_pass(name: str, backend: str) -> None:
    """Stochastic, rotated, delayed, split, MS-EDEN, per-128 scales: nothing is to be said but one line."""
    plan = planned(name, backend)
    for dtype in (BF16, FP32):
        line = verify.verify(plan, 100, dtype, CPU)
        assert line.startswith("backends checked against the oracle: ") and " products in " in line


def test_what_is_checked_is_each_distinct_product_once(monkeypatch) -> None:
    """Equal layers share a check, sizes are capped but for contracted features, and a second call remembers."""
    done = []
    true = verify.mismatch
    monkeypatch.setattr(verify, "mismatch", lambda *args: done.append(args[1]) or true(*args))
    plan = planned("nvfp4", shape=(1024, 1024))  # two layers of one shape
    assert "torch 3 products" in verify.verify(plan, 4096, BF16, CPU) and len(done) == 3
    assert [(case.role, case.sizes) for case in done] == [
        ("fprop", (ROWS, ROWS, 1024)), ("dgrad", (ROWS, ROWS, 1024)), ("wgrad", (ROWS, ROWS, TOKENS))
    ]  # fmt: skip
    assert done[2].served == (1024, 1024, 4096)
    assert "torch 3 products" in verify.verify(plan, 4096, BF16, CPU) and len(done) == 3


def test_nothing_is_checked_where_nothing_can_differ() -> None:
    assert verify.verify(planned("nvfp4", "oracle"), 64, BF16, CPU) == ""
    assert verify.verify(planned("bf16"), 64, BF16, CPU) == ""


def test_every_part_of_a_split_is_checked() -> None:
    """A split by channels sends several pairs of operands to the backend; all of them are held to the oracle."""
    found = [case for _, case in cases(planned("tetrajet_v2"), 64, BF16, CPU)]
    assert len({(case.role, str(case.gemm.a), str(case.gemm.b)) for case in found}) > 3
    assert all(case.gemm.a.split is None and case.gemm.b.split is None for case in found)


# ---- broken


def scaled(one: oracle.Prepared, factor: float) -> oracle.Prepared:
    return oracle.Prepared(one.values * factor, one.scales, one.block, one.tensor_scale)


class Zeros(Torch):
    """What a peer shipped: gradients rounded stochastically come out as zeros."""

    def prepare(self, x, gemm, side, stream, role, amax=None, window=None):
        made = super().prepare(x, gemm, side, stream, role, amax, window)
        return scaled(made, 0.0) if getattr(gemm, side).rounding == "stochastic" else made


class Stored(Torch):
    """What is kept for the backward is not what was prepared."""

    def stored(self, prepared, gemm, side):
        return scaled(prepared, 2.0)


class OneCode(Torch):
    """One element of an operand is another code."""

    def prepare(self, x, gemm, side, stream, role, amax=None, window=None):
        made = super().prepare(x, gemm, side, stream, role, amax, window)
        values = made.values.clone()
        values[2, 5] *= -1
        return oracle.Prepared(values, made.scales, made.block, made.tensor_scale) if role == "wgrad" else made


class TensorScale(Torch):
    """The tensor scale is off by one unit in its last place."""

    def unpacked(self, prepared, dtype):
        values, scale = super().unpacked(prepared, dtype)
        return values, torch.nextafter(scale, scale * 2)


class Product(Torch):
    """Right operands, a product that leaves out one element of the contracted axis."""

    def multiply(self, a, b, gemm, out_dtype):
        values = a.values.clone()
        values[:, -1] = 0
        return Torch.multiply(self, oracle.Prepared(values, a.scales, a.block, a.tensor_scale), b, gemm, out_dtype)


class Nan(Torch):
    """One output is NaN, in bf16 only."""

    def multiply(self, a, b, gemm, out_dtype):
        out = super().multiply(a, b, gemm, out_dtype)
        if out_dtype == BF16:
            out[0, 0] = torch.nan
        return out


class Crash(Torch):
    """A kernel that does not start."""

    def multiply(self, a, b, gemm, out_dtype):
        raise RuntimeError("no kernel image is available")


WRONG = [
    (Zeros, r"dgrad: backend 'torch' on cpu is not the definition: dy quantised to nvfp4~ is all zeros"),
    (OneCode, r"wgrad: .* dy quantised to nvfp4~ differs in 0.02% of its values, the first at \(2, 5\): .* instead of"),
    (Stored, r"fprop: .* products are beyond the bound"),
    (TensorScale, r"fprop: .* x quantised to nvfp4 differs in .*% of its values"),
    (
        Product,
        r"fprop: .* products are beyond the bound of their fp32 sums, such as \(\d+, \d+\): .* instead of .* \+- ",
    ),
    (Nan, r"fprop: .*: 1 of \d+ products .* \(0, 0\): nan instead of"),
]


def broken(monkeypatch: pytest.MonkeyPatch, cls: type[Torch]) -> None:
    """The backend `torch` is now this one."""
    monkeypatch.setattr("lowprec.linear.backends.Torch", cls)
    forget()


@pytest.mark.parametrize(("cls", "said"), WRONG)
def test_a_broken_backend_stops_the_run(monkeypatch, cls: type[Torch], said: str) -> None:
    """Layer, shape, product, backend, what differs, and the fix, in one sentence."""
    plan = planned("nvfp4")
    broken(monkeypatch, cls)
    with pytest.raises(ValueError, match=LAYER + said) as caught:
        verify.verify(plan, 64, BF16, CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=FIX):
        verify.verify(plan, 64, BF16, CPU)


class Own(Torch):
    """Draws random bits of its own, as a library does: not the definition's drawing, but as near to x."""

    exact = staticmethod(lambda gemm: "stochastic" not in (gemm.a.rounding, gemm.b.rounding))

    def prepare(self, x, gemm, side, stream, role, amax=None, window=None):
        return super().prepare(x, gemm, side, Stream(99, 1, 1, "own"), role, amax, window)


class OwnZeros(Own):
    """... and rounds gradients to zero."""

    def prepare(self, x, gemm, side, stream, role, amax=None, window=None):
        made = super().prepare(x, gemm, side, stream, role, amax, window)
        return made if self.exact(gemm) else scaled(made, 0.0)


class OwnHalf(Own):
    """... and halves them."""

    def multiply(self, a, b, gemm, out_dtype):
        return super().multiply(a, b, gemm, out_dtype) * (1.0 if self.exact(gemm) else 0.5)


class OwnBiased(Own):
    """... and takes a little of each, less than the noise."""

    def multiply(self, a, b, gemm, out_dtype):
        return super().multiply(a, b, gemm, out_dtype) * (1.0 if self.exact(gemm) else 0.9)


class Ties(OneCode):
    """Rounds a code of ten thousand to the other side, and says so."""

    ties = 1e-3


class TiesProduct(Ties):
    """... and multiplies wrongly."""

    multiply = Product.multiply


def test_a_backend_with_random_bits_of_its_own(monkeypatch) -> None:
    """It cannot be equal, so it is judged by its distance from the unquantised product; zeros and bias are found."""
    plan = planned("nvfp4")
    for cls, said in (
        (Own, None),
        (OwnZeros, "the product is all zeros"),
        (OwnBiased, "in the mean: its rounding is biased"),
        (OwnHalf, "the product's relative error is 0"),
    ):
        broken(monkeypatch, cls)
        if said is None:
            assert "torch 6 products" in verify.verify(plan, 64, BF16, CPU)
        else:
            with pytest.raises(ValueError, match=said):
                verify.verify(plan, 64, BF16, CPU)


def test_a_backend_that_breaks_ties_otherwise(monkeypatch) -> None:
    """A share of unequal codes that it announces is let pass; a product that is not that of its operands is not."""
    plan = planned("nvfp4")
    broken(monkeypatch, Ties)
    assert verify.verify(plan, 64, BF16, CPU)
    broken(monkeypatch, TiesProduct)
    with pytest.raises(ValueError, match="beyond the bound"):
        verify.verify(plan, 64, BF16, CPU)


def test_hardware_sums_of_fp8_have_a_bound_of_their_own(monkeypatch) -> None:
    """Ada, Hopper and sm_120 keep 14 bits of an FP8 sum; sm_100 does not, nor does FP4 anywhere."""
    _, fp8 = next(cases(planned("fp8_tensorwise"), 64, BF16, CPU))
    _, fp4 = next(cases(planned("nvfp4"), 64, BF16, CPU))
    for capability, wanted in (((9, 0), 2.0**-10), ((8, 9), 2.0**-10), ((12, 0), 2.0**-10), ((10, 0), 2.0**-17)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        for case in (fp8, fp4):
            gpu = verify.Case(
                case.backend, case.gemm, "fprop", (16, 16, 64), (16, 16, 64), BF16, torch.device("cuda", 0)
            )
            assert verify.sum_error(gpu) == (wanted if case is fp8 else 2.0**-17)


# ---- a run


def words(folder: Path, *more: str) -> list[str]:
    return ["recipe=nvfp4_tiny", f"run.dir={folder}", "train.steps=1", "precision.backend=torch", *more]


def train(monkeypatch, cls: type[Torch], *command: str) -> int:
    broken(monkeypatch, cls)
    try:
        return main(list(command))
    finally:
        forget()


def test_training_does_not_begin(monkeypatch, capsys, tmp_path: Path) -> None:
    """Exit code 2 and the sentence; nothing was trained or saved. `precision.verify=false` is the switch."""
    small = ("data.seq_len=32", "train.micro_batch=1", "train.global_batch=1", "train.sample_tokens=0")
    assert train(monkeypatch, Zeros, *words(tmp_path / "a", *small)) == 2
    err = capsys.readouterr().err
    assert (
        "lowprec-train: layer 'layers.0.attn.q_proj' (128, 128), dgrad: backend 'torch'" in err and "all zeros" in err
    )
    assert not list((tmp_path / "a").glob("checkpoints/*"))
    with pytest.raises(ValueError, match="expected true or false"):
        load_precision({"rules": [{"match": "*", "recipe": "bf16"}], "verify": "no"})
    called: list[Any] = []
    monkeypatch.setattr("lowprec.train.session.verify", lambda *args: called.append(args) or "checked so many")
    assert main(words(tmp_path / "b", *small, "precision.verify=false")) == 0 and not called
    assert main(words(tmp_path / "c", *small)) == 0 and len(called) == 1
    assert "checked so many\n" in capsys.readouterr().out


def one_rank_is_broken(name: str) -> str:
    cls: Callable[..., Any] = {"Zeros": Zeros, "Crash": Crash}[name]
    if dist.get_rank() == 1:
        backends.Torch = cls  # type: ignore[misc]
    try:
        return verify.verify(planned("nvfp4"), 64, BF16, CPU, dist.group.WORLD)
    except ValueError as error:
        return str(error)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "said"), [("Zeros", "is all zeros"), ("Crash", "RuntimeError: no kernel image")])
def test_one_broken_rank_stops_all(name: str, said: str) -> None:
    """The other rank, whose backends are sound, stops with the same sentence instead of waiting."""
    first, second = run(2, one_rank_is_broken, name)
    assert first == second and said in first


def test_samples_are_like_training(monkeypatch) -> None:
    """Outliers in x, a row of zeros, small gradients: and the same ones every time."""
    _, case = next(cases(planned("nvfp4"), 64, BF16, CPU))
    made: dict[str, Tensor] = {name: verify.sample(name, 64, 128, case, Stream(1)) for name in ("x", "w", "dy")}
    assert made["x"].abs().max() > 20 and not made["x"][32].any() and made["dy"].float().abs().median() < 1e-3
    assert made["w"].all() and torch.equal(made["x"], verify.sample("x", 64, 128, case, Stream(1)))
