"""The executor of compiled code: whole kernels, divergence, memory checks, traffic."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from lowprec.kernels.testing.compile import compile_for, signature_of
from lowprec.kernels.testing.ptx import Fault, Run, run_ptx

ARCHES = ("sm_90", "sm_100", "sm_120")


def execute(kernel, grid, args, constants, arch="sm_90", align=(), **options) -> Run:
    return run_ptx(compile_for(kernel, signature_of(args), constants, arch, align=align, **options), grid, args)


def raw(body: str, threads: int = 64, shared: int = 256, steps: int = 2000, **args) -> Run:
    """A few lines of PTX by hand: %r0..15, %rd0..15, %p0..7; %rd0 = the pointer x, %r0 = the thread."""
    parameters = ",".join(f".param .u64 {n}" for n in args)
    ptx = f""".visible .entry by_hand({parameters}) .reqntid {threads}
    {{ .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .pred %p<8>;
    ld.param.b64 %rd0, [x]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd0, %rd1;
    {body}
    ret; }}"""
    kernel = SimpleNamespace(name="by_hand", ptx=ptx, arguments=tuple(args), shared_bytes=shared)
    return run_ptx(kernel, (2,), args, steps=steps)


@triton.jit
def rows(x_ptr, max_ptr, sum_ptr, first_ptr, total_ptr, n, N: tl.constexpr):
    """One row a program: masked loads, reductions over the block (shuffles, shared memory), atomics."""
    row = tl.program_id(0)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(max_ptr + row, tl.max(x, 0))
    tl.store(sum_ptr + row, tl.sum(x, 0))
    tl.store(first_ptr + row, tl.argmax(x, 0))
    tl.atomic_max(total_ptr, tl.max(tl.abs(x), 0))
    tl.atomic_add(total_ptr + 1, 1.0)


@pytest.mark.parametrize("arch", ARCHES)
def test_reductions_masks_atomics(arch: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-1000, 1000, (9, 300), generator=g).bfloat16()  # sums are exact in fp32, in any order
    args = {"x_ptr": x, "max_ptr": torch.zeros(9), "sum_ptr": torch.zeros(9),
            "first_ptr": torch.zeros(9, dtype=torch.int32), "total_ptr": torch.zeros(2), "n": 300}  # fmt: skip
    execute(rows, (9,), args, {"N": 512}, arch)
    f = x.float()
    assert torch.equal(args["max_ptr"], f.max(1).values)
    assert torch.equal(args["sum_ptr"], f.sum(1))
    assert torch.equal(args["first_ptr"].long(), f.argmax(1))
    assert args["total_ptr"].tolist() == [float(f.abs().max()), 9.0]


@triton.jit
def transposed(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(y_ptr + n[:, None] * M + m[None, :], tl.trans(x))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_transpose_through_shared_memory(arch: str, dtype: torch.dtype) -> None:
    """Layout conversions, vector access to shared memory, ldmatrix/stmatrix: moved bytes are exactly two tensors."""
    x = torch.randint(0, 250, (64, 128), generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(128, 64, dtype=dtype)
    run = execute(transposed, (1,), {"x_ptr": x, "y_ptr": y}, {"M": 64, "N": 128}, arch)
    assert torch.equal(y, x.T)
    assert run.moved_bytes() == 2 * x.nbytes


@triton.jit
def looped(x_ptr, y_ptr, n, N: tl.constexpr):
    """Loops whose trips differ between programs, and a branch that only some programs take."""
    p = tl.program_id(0)
    i = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for k in range(p, n, 3):
        total += tl.load(x_ptr + k * N + i)
    if p == 1:
        total = -total
    tl.store(y_ptr + p * N + i, total)


def test_loops_and_branches_of_programs() -> None:
    x, y = torch.arange(7 * 64.0).view(7, 64), torch.zeros(3, 64)
    execute(looped, (3,), {"x_ptr": x, "y_ptr": y, "n": 7}, {"N": 64})
    assert torch.equal(y, torch.stack([x[0::3].sum(0), -x[1::3].sum(0), x[2::3].sum(0)]))


@triton.jit
def assorted(x_ptr, sum_ptr, sorted_ptr, count_ptr, wide_ptr, n, N: tl.constexpr):
    p = tl.program_id(0) + 2 * tl.program_id(1) + 6 * tl.program_id(2)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + p * N + i)
    tl.store(sum_ptr + p * N + i, tl.cumsum(x, 0))
    tl.store(sorted_ptr + p * N + i, tl.sort(x, 0))
    tl.store(count_ptr + p * 16 + tl.arange(0, 16), tl.histogram(x & 15, 16))
    w = x.to(tl.int64) * 0x123456789
    tl.store(wide_ptr + p * N + i, w // n + w % n * (x >> 3))


def test_grids_scans_sorts_histograms_and_wide_integers() -> None:
    x = torch.randint(-1000, 1000, (12, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(4))
    args = {"x_ptr": x, "sum_ptr": torch.zeros_like(x), "sorted_ptr": torch.zeros_like(x),
            "count_ptr": torch.zeros(12, 16, dtype=torch.int32), "wide_ptr": torch.zeros(12, 256, dtype=torch.int64),
            "n": 12345}  # fmt: skip
    execute(assorted, (2, 3, 2), args, {"N": 256})
    w = x.long() * 0x123456789
    q = torch.div(w, 12345, rounding_mode="trunc")
    assert torch.equal(args["sum_ptr"].long(), x.cumsum(1))
    assert torch.equal(args["sorted_ptr"], x.sort(1).values)
    assert torch.equal(args["count_ptr"].long(), torch.stack([(r & 15).bincount(minlength=16) for r in x]))
    assert torch.equal(args["wide_ptr"], q + (w - q * 12345) * (x >> 3))


@triton.jit
def pipelined(x_ptr, y_ptr, n, N: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for k in tl.range(0, n, num_stages=3):
        total += tl.load(x_ptr + (p * n + k) * N + i)
    tl.store(y_ptr + p * N + i, total)


def test_asynchronous_copies() -> None:
    """A loop that the compiler pipelines through shared memory with cp.async."""
    x, y = torch.randint(-99, 99, (4, 8, 128), generator=torch.Generator().manual_seed(4)).float(), torch.zeros(4, 128)
    run = execute(pipelined, (4,), {"x_ptr": x, "y_ptr": y, "n": 8}, {"N": 128})
    assert torch.equal(y, x.sum(1)) and any(o.startswith("cp.async") for o in run.counts)
    assert run.traffic["x_ptr", "load"].unique_bytes == x.nbytes


def test_threads_diverge_and_meet() -> None:
    """Collatz lengths, one number a thread: a loop that every thread leaves at its own time."""
    x = torch.zeros(64, dtype=torch.int32)
    raw(
        """add.s32 %r1, %r0, 1; mov.u32 %r2, 0;
        LOOP: setp.eq.s32 %p0, %r1, 1; @%p0 bra DONE;
        and.b32 %r3, %r1, 1; setp.eq.s32 %p1, %r3, 0; @%p1 bra EVEN;
        mad.lo.s32 %r1, %r1, 3, 1; bra NEXT;
        EVEN: shr.u32 %r1, %r1, 1;
        NEXT: add.s32 %r2, %r2, 1; bra LOOP;
        DONE: bar.sync 0; st.global.b32 [%rd1], %r2;""",
        x=x,
    )

    def collatz(n: int) -> int:
        return 0 if n == 1 else 1 + collatz(3 * n + 1 if n % 2 else n // 2)

    assert x.tolist() == [collatz(n) for n in range(1, 65)]


def test_threads_wait_at_a_barrier_for_those_that_loop_longer() -> None:
    """Thread t goes round t + 1 times, backwards branch last; then everybody reads what the neighbour stored."""
    x = torch.zeros(64, dtype=torch.int32)
    raw(
        """mov.u32 %r1, 0; mov.u32 %r2, 0;
        LOOP: add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1; setp.le.s32 %p0, %r1, %r0; @%p0 bra LOOP;
        shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], %r2; bar.sync 0;
        xor.b32 %r3, %r3, 4; ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd1], %r4;""",
        x=x,
    )
    assert x.tolist() == [(t ^ 1) * ((t ^ 1) + 1) // 2 for t in range(64)]


def test_shuffles_votes_and_warp_reductions() -> None:
    """By hand, lane by lane, against the manual's definitions."""
    x = torch.zeros(7, 64, dtype=torch.int32)
    raw(
        """mul.lo.s32 %r1, %r0, %r0;
        shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1; st.global.b32 [%rd1], %r2;
        shfl.sync.up.b32 %r2|%p0, %r1, 3, 0, -1; @!%p0 add.s32 %r2, %r2, 1000; st.global.b32 [%rd1+256], %r2;
        shfl.sync.down.b32 %r2, %r1, 2, 6175, -1; st.global.b32 [%rd1+512], %r2;
        shfl.sync.idx.b32 %r2, %r1, 9, 31, -1; st.global.b32 [%rd1+768], %r2;
        redux.sync.add.s32 %r2, %r1, -1; st.global.b32 [%rd1+1024], %r2;
        setp.gt.s32 %p1, %r1, 100; vote.sync.ballot.b32 %r2, %p1, -1; st.global.b32 [%rd1+1280], %r2;
        elect.sync %r3|%p2, -1; selp.b32 %r2, 1, 0, %p2; st.global.b32 [%rd1+1536], %r2;""",
        x=x,
    )
    square = [t * t for t in range(64)]
    warp = [t - t % 32 for t in range(64)]
    lane = [t % 32 for t in range(64)]
    assert x[0].tolist() == [square[t ^ 5] for t in range(64)]
    assert x[1].tolist() == [square[t - 3] if lane[t] >= 3 else square[t] + 1000 for t in range(64)]
    segment = 6175 >> 8  # 24: groups of eight lanes
    assert segment == 24 and 6175 & 31 == 31
    assert x[2].tolist() == [square[t + 2] if lane[t] % 8 < 6 else square[t] for t in range(64)]
    assert x[3].tolist() == [square[warp[t] + 9] for t in range(64)]
    assert x[4].tolist() == [sum(square[warp[t] : warp[t] + 32]) for t in range(64)]
    ballot = [sum((square[w + k] > 100) << k for k in range(32)) for w in (0, 32)]
    assert [v & 0xFFFFFFFF for v in x[5].tolist()] == [ballot[t // 32] for t in range(64)]
    assert x[6].tolist() == [int(lane[t] == 0) for t in range(64)]


def test_atomics_return_what_was_there() -> None:
    """Tickets are all different whatever the order; exchange, cas and min end where they must."""
    x = torch.zeros(70, dtype=torch.int32)
    x[66] = 1 << 20
    raw(
        """atom.global.add.u32 %r1, [%rd0], 1; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd0, %rd2;
        mov.u32 %r5, %ctaid.x; setp.eq.s32 %p0, %r5, 0;
        @%p0 red.global.add.u32 [%rd0+4], 1; red.global.min.u32 [%rd0+264], %r0;
        setp.eq.s32 %p1, %r0, 3; @%p1 atom.global.exch.b32 %r2, [%rd0+268], 77;
        @%p1 atom.global.cas.b32 %r2, [%rd0+268], 77, 78;""",
        x=x,
    )
    assert x[0] == 128 and x[1] == 64 and x[66] == 0 and x[67] in (77, 78)


@triton.jit
def copied(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_out_of_bounds_is_caught() -> None:
    """One element short, on either side of the copy: named with argument, program and thread."""
    full, short = torch.zeros(512), torch.zeros(511)
    with pytest.raises(Fault, match=r"store.*out of bounds: y_ptr \+\d+, which has 2044 bytes.*program \(1, 0, 0\)"):
        execute(copied, (2,), {"x_ptr": full, "y_ptr": short, "n": 512}, {"N": 256})
    with pytest.raises(Fault, match=r"load.*out of bounds: x_ptr"):
        execute(copied, (2,), {"x_ptr": short, "y_ptr": full, "n": 512}, {"N": 256})


def test_misalignment_is_caught() -> None:
    """The compiler was promised 16 bytes and the tensor starts at 4: a GPU would trap."""
    x, y = torch.zeros(513)[1:], torch.zeros(512)
    with pytest.raises(Fault, match="misaligned: x_ptr"):
        execute(copied, (2,), {"x_ptr": x, "y_ptr": y, "n": 512}, {"N": 256})
    args = {"x_ptr": x, "y_ptr": y, "n": 512}
    compiled = compile_for(copied, signature_of(args), {"N": 256}, "sm_90", align={"x_ptr": 4})
    run_ptx(compiled, (2,), args)
    assert set(compiled.global_accesses()["load"]) == {4}


@pytest.mark.parametrize(
    "body,message",
    [
        ("setp.lt.s32 %p0, %r0, 40; @%p0 bra OUT; bar.sync 0; OUT: ret;", "part of the threads of a program"),
        ("setp.lt.s32 %p0, %r0, 40; @%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "part of a warp"),
        ("st.shared.b32 [%r0], %r0;", "misaligned"),
        ("shl.b32 %r1, %r0, 3; st.shared.b32 [%r1], %r0;", "leaves the 256 bytes of shared memory"),
        ("LOOP: add.s32 %r1, %r0, 1; bra LOOP;", "did not end"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 %r1, %r2, %r3, %r4;", "tensor cores"),
        ("add.rz.f32 %r1, %r0, %r0;", "modifier .rz of add.rz.f32"),
        ("vadd4.u32.u32.u32 %r1, %r0, %r0, %r0;", "opcode vadd4"),
        ("trap;", "trapped"),
        ("st.global.b32 [%rd0], %r0;", "different values at once: x [+]0"),
        ("mov.u32 %r1, %ctaid.x; st.global.b32 [%rd0], %r1;", "different values at once"),
        (
            "mov.u32 %r1, %ctaid.x; setp.eq.s32 %p0, %r1, 1; @%p0 st.global.b32 [%rd0], 5; ld.global.b32 %r2, [%rd0];",
            "loads what another stored",
        ),
        (
            "mov.u32 %r1, %ctaid.x; setp.eq.s32 %p0, %r1, 1; @%p0 st.global.b32 [%rd0], 5;"
            "@!%p0 st.global.b32 [%rd0], 6;",
            "stores something else than another did",
        ),
        ("ld.global.b32 %r1, [%rd1+1024];", r"out of bounds: x \+1024, which has 1024 bytes"),
    ],
)
def test_faults_are_sentences(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        raw(body, x=torch.zeros(256, dtype=torch.int32))


def test_arguments_are_checked() -> None:
    compiled = compile_for(copied, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"N": 256}, "sm_90")
    with pytest.raises(ValueError, match="y_ptr, n is missing or unknown"):
        run_ptx(compiled, (1,), {"x_ptr": torch.zeros(1)})
    promised = compile_for(copied, {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}, {"N": 256}, "sm_90", align=["n"])
    with pytest.raises(ValueError, match="n a multiple of 16, and it is 24"):
        run_ptx(promised, (1,), {"x_ptr": torch.zeros(256), "y_ptr": torch.zeros(256), "n": 24})
    with pytest.raises(ValueError, match="whole number"):
        run_ptx(compiled, (1,), {"x_ptr": torch.zeros(1), "y_ptr": torch.zeros(1), "n": 1.5})


@triton.jit
def strided(x_ptr, y_ptr, STEP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i * STEP)
    tl.store(y_ptr + i, x + tl.load(x_ptr + i * STEP))


@pytest.mark.parametrize("step,sectors", [(1, 16), (2, 32), (8, 128), (32, 128)])
def test_sectors(step: int, sectors: int) -> None:
    """128 threads read one float each, `step` apart: 32-byte sectors are shared by 8/step of them."""
    x, y = torch.arange(128.0 * step), torch.zeros(128)
    run = execute(strided, (1,), {"x_ptr": x, "y_ptr": y}, {"STEP": step, "N": 128})
    loads, stores = run.traffic["x_ptr", "load"], run.traffic["y_ptr", "store"]
    assert torch.equal(y, 2 * x[::step])
    twice = loads.requests // 4  # the compiler may keep or merge the two equal loads
    assert (loads.sectors, loads.bytes, loads.unique_bytes) == (twice * sectors, twice * 512, 32 * sectors)
    assert (stores.requests, stores.sectors, stores.bytes, stores.unique_bytes) == (4, 16, 512, 512)
    assert stores.efficiency == 1.0 and loads.efficiency == 16 / sectors


def test_masked_threads_move_nothing() -> None:
    """100 of 512 elements: 13 sectors of 8 floats, and a warp that is masked entirely makes no request."""
    x, y = torch.arange(512.0), torch.zeros(512)
    run = execute(masked, (1,), {"x_ptr": x, "y_ptr": y, "n": 100}, {"N": 512}, num_warps=16)
    assert torch.equal(y, torch.where(torch.arange(512) < 100, x, 0))
    bill = run.traffic["x_ptr", "load"]
    assert (bill.requests, bill.sectors, bill.bytes, bill.unique_bytes) == (4, 13, 400, 416)


@triton.jit
def masked(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)
