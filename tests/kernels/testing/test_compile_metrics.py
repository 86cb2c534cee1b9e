"""What is read off machine code: counted on kernels whose code is known, and on text written by hand."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing import sass
from lowprec.kernels.testing.chips import ARCHES, PRODUCT, chip_of
from lowprec.kernels.testing.compile import Compiled, compile_for, signature_of


@triton.jit
def scaled(x_ptr, y_ptr, s_ptr, n, N: tl.constexpr, HOW: tl.constexpr = "multiply"):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i).to(tl.float32)
    s = tl.load(s_ptr)
    if HOW == "divide":
        x = tl.math.div_rn(x, s)
    elif HOW == "loop":
        for _ in range(n):
            x = x * s + 1.0
    elif HOW == "masked":
        x = x * s
        tl.store(y_ptr + i, x.to(tl.bfloat16), mask=i < n)
        return
    else:
        x = x * s
    tl.store(y_ptr + i, x.to(tl.bfloat16))


SIGNATURE = {"x_ptr": "*bf16", "y_ptr": "*bf16", "s_ptr": "*fp32", "n": "i32"}


def build(how: str, arch: str = "sm_100", n: int = 1024, align=("n",), **options) -> Compiled:
    return compile_for(scaled, SIGNATURE, {"N": n, "HOW": how}, arch, align=align, **options)


@pytest.mark.parametrize("arch", PRODUCT)
def test_a_streaming_kernel(arch: str) -> None:
    """8 bf16 a thread: one 16-byte load, one 16-byte store, 8 multiplications in one form or another, no stack."""
    c = build("multiply", arch)
    assert c.threads == 128 and c.arguments == ("x_ptr", "y_ptr", "s_ptr", "n")
    accesses = c.global_accesses()
    assert accesses["load"] == {16: 1, 4: 1} and accesses["store"] == {16: 1} and not accesses["atomic"]
    assert c.count(r"LDG\.E\.128") == 1 and c.count("^FMUL ") + 2 * c.count("^FMUL2 ") == 8
    assert c.count_ptx(r"ld\.global\.v4") == 1
    assert c.stack_bytes == 0 and c.shared_bytes == 0 and not c.over_limits() and not c.loops
    assert f".target sm_{arch[3:]}a" in c.ptx
    main = [i for i in c.instructions if i.on_main_path]
    assert main[-1].opcode == "EXIT" and len(main) == c.executed()
    assert c.instructions_per_element(1024) == len(main) * 128 / 1024 < 8
    assert c.warps_per_sm == chip_of(arch).warps


def test_unaligned_pointers_narrow_the_loads() -> None:
    c = build("multiply", align={"x_ptr": 2, "y_ptr": 4})
    assert c.global_accesses()["load"] == {2: 8, 4: 1} and c.global_accesses()["store"] == {4: 4}


def test_the_slow_path_of_a_division_is_off_the_main_path() -> None:
    """div_rn calls a subroutine for rare operands; those instructions exist, and are not counted as executed."""
    c = build("divide", n=128)
    off = [i for i in c.instructions if not i.on_main_path and i.opcode != "NOP"]
    assert c.count("CALL") >= 1 and c.count("CALL", main_path=True) == 0 and c.count("MUFU.RCP", main_path=True) >= 1
    assert len(off) > 20
    fast = build("multiply", n=128)
    assert 5 < c.executed() - fast.executed() < 25


def test_loops_are_weighed_by_their_trips() -> None:
    """More trips cost exactly the loop's instructions each; without trips there is no number."""
    c = build("loop", n=128)
    assert c.loops
    with pytest.raises(ValueError, match="trips"):
        c.executed()
    assert c.executed(5) - c.executed(4) == len({i for i in c.instructions if i.on_main_path and i.loops})
    head = c.loops[0]
    assert c.executed([3] + [0] * (len(c.loops) - 1)) - c.executed(0) == 3 * c.loop_instructions(head)
    with pytest.raises(ValueError):
        c.executed([1] * (len(c.loops) + 1))


def test_spills_are_seen() -> None:
    """A kernel held to 24 registers spills: ptxas says nothing, `over_limits` does."""
    c = build("multiply", n=8192, num_warps=1, maxnreg=24)
    assert c.stack_bytes > 0 and c.count("STL") > 0
    assert any("spills" in sentence for sentence in c.over_limits())


BY_HAND = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FCHK P0, R4, R5 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   MOV R6, 0x60 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
        /*0060*/                   MOV R4, R7 ;
.L_x_1:
        /*0070*/                   BRA.DIV ~URZ, `(.L_x_3) ;
.L_x_2:
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
        /*00a0*/                   NOP ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
        /*00c0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
        /*00f0*/                   BRA `(.L_x_2) ;
$__internal_0_$slow:
        /*0100*/                   MUFU.RCP R7, R5 ;
        /*0110*/                   RET.REL.NODEC R6 `(kernel) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
"""


def test_main_path_and_loops_by_hand() -> None:
    """Calls, what is only behind them, divergent shuffles, the padding loop and NOPs are off; nesting multiplies."""
    code = sass.parse(BY_HAND)
    assert [i.address for i in code if i.on_main_path] == [
        0x00, 0x10, 0x20, 0x30, 0x70, 0x80, 0x90, 0xB0, 0xC0, 0xD0
    ]  # fmt: skip
    assert sass.loop_heads(code) == [0x10, 0x80]
    inner = next(i for i in code if i.address == 0x90)
    assert inner.loops == (0x10, 0x80) and inner.predicate == "P1" and str(inner) == "@P1 BRA `(.L_x_2)"
    widths = {"LDG.E.128": 16, "LDG.E": 4, "STG.E.U8": 1, "LDG.E.ENL2.256": 32, "STG.E.U16.STRONG.GPU": 2}
    assert {o: sass.access_bytes(o) for o in widths} == widths
    fake = Compiled("kernel", "sm_90", ".reqntid 32", b"", SimpleNamespace(shared=0, num_warps=1), (), ())
    fake.__dict__["instructions"] = code
    assert fake.executed([2, 3]) == 1 + 2 * (3 + 1 + 3 * 2 + 1) + 2


@pytest.mark.parametrize(
    "arch,registers,shared,threads,ctas",
    [
        ("sm_90", 32, 0, 128, 16),  # 64 warps of 4: the warps decide
        ("sm_90", 33, 0, 128, 12),  # 40 registers a thread after rounding: 12 warps a quarter
        ("sm_90", 128, 0, 128, 4),
        ("sm_90", 255, 0, 256, 1),
        ("sm_90", 32, 100 << 10, 128, 2),  # shared memory decides, with 1 KiB of the system's each
        ("sm_90", 32, 114 << 10, 128, 1),
        ("sm_90", 16, 0, 32, 32),  # no more than 32 programs
        ("sm_120", 32, 0, 128, 12),
        ("sm_120", 32, 0, 32, 24),
        ("sm_100", 64, 0, 1024, 1),
        ("sm_100", 64, 228 << 10, 128, 0),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, threads: int, ctas: int) -> None:
    """Rows of NVIDIA's occupancy calculator, by hand."""
    assert chip_of(arch).ctas_per_sm(registers, shared, threads) == ctas


def test_roofline_units() -> None:
    """16 GB at 8 TB/s are 2 ms; one instruction per lane and cycle of the whole chip is one cycle."""
    chip = chip_of("sm_100")
    assert chip.memory_seconds(16e9) == pytest.approx(2e-3)
    assert chip.issue_seconds(chip.sms * 4 * 32) == pytest.approx(1e-9 / chip.clock_ghz)


def test_limits_are_sentences() -> None:
    metadata = SimpleNamespace(shared=300_000, tmem_size=640, num_warps=4)
    c = Compiled("greedy", "sm_100", ".reqntid 128", b"", metadata, (), ())
    c.__dict__["_usage"] = {"REG": 64, "STACK": 8}
    text = "\n".join(c.over_limits())
    assert "spills: 8 bytes" in text and "300000 bytes of shared memory" in text and "640 columns" in text
    assert "fits on an SM" in text


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown z_ptr and nothing for n"):
        compile_for(scaled, {"x_ptr": "*bf16", "y_ptr": "*bf16", "s_ptr": "*fp32", "z_ptr": "*fp32"}, {"N": 8}, "sm_90")
    with pytest.raises(ValueError, match="described for kernels"):
        compile_for(scaled, SIGNATURE, {"N": 128}, "sm_89")
    assert set(PRODUCT) <= set(ARCHES)


def test_signatures_of_values() -> None:
    args = {"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.zeros(1, dtype=torch.uint8), "n": 5, "m": 2**40}
    more = {"f": 1.5, "e": torch.zeros(1).to(torch.float8_e4m3fn)}
    want = {"a": "*bf16", "b": "*u8", "n": "i32", "m": "i64", "f": "fp32", "e": "*fp8e4nv"}
    assert signature_of({**args, **more}) == want
