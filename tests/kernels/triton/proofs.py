"""What the tests of Triton kernels share: equality with the definition, and a launch that executes compiled PTX."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowprec.kernels.testing.compile import Compiled, compile_for, signature_of
from lowprec.kernels.testing.ptx import Run, run_ptx
from lowprec.kernels.triton.launch import Launch
from lowprec.numerics.qtensor import QTensor


def assert_equal(a: QTensor, b: QTensor) -> None:
    """Codes, scales and tensor scale, bit for bit (one NaN being as good as another)."""
    wrong = (a.codes != b.codes).nonzero()
    assert not len(wrong), f"{len(wrong)} codes differ, the first at {wrong[0].tolist()}"
    assert a.scales.shape == b.scales.shape and a.scales.dtype == b.scales.dtype
    assert_same(a.scales.float(), b.scales.float())
    assert (a.tensor_scale is None) == (b.tensor_scale is None)
    if a.tensor_scale is not None and b.tensor_scale is not None:
        assert_same(a.tensor_scale, b.tensor_scale)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@dataclass
class Proof:
    """One launch, compiled for a chip and executed on the CPU."""

    launch: Launch
    compiled: Compiled
    run: Run

    @property
    def elements(self) -> int:
        """Of one program."""
        return self.launch.constants["ROWS"] * self.launch.constants["COLUMNS"]

    @property
    def elements_per_thread(self) -> int:
        return self.elements // self.compiled.threads

    @property
    def instructions_per_element(self) -> float:
        return self.compiled.instructions_per_element(self.elements)


def on(arch: str, proofs: list[Proof]) -> Callable[[Launch], None]:
    """A `start` for `quantize` that compiles for `arch`, executes, and notes both in `proofs`."""

    def start(launch: Launch) -> None:
        sizes = [n for n in ("rows", "k", "pitch", "words", "words_t") if n in launch.args and not launch.args[n] % 16]
        signature = signature_of(launch.args)
        c = compile_for(launch.kernel, signature, launch.constants, arch, align=sizes, num_warps=launch.warps)
        proofs.append(Proof(launch, c, run_ptx(c, launch.grid, launch.args)))

    return start
