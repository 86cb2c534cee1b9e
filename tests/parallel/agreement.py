"""Training a small model on any layout, for tests that compare layouts: what one process does, the others must do.

one = ranks.run(1, train, Case("nvfp4"))[0]
two = ranks.run(2, train, Case("nvfp4"), dict(tp=2))[0]
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from lowprec.comm.config import CommConfig
from lowprec.data import Batch
from lowprec.linear import Plan, load_precision
from lowprec.linear.precision import Rule
from lowprec.model import ModelConfig, build, cross_entropy
from lowprec.model.attention import Attention
from lowprec.model.mlp import MLP
from lowprec.optim import OptimConfig, build_optimizer
from lowprec.parallel import Engine, ParallelConfig, World, parallelize, start_world

MODEL = ModelConfig(
    vocab_size=384,
    dim=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn_dim=128,
    max_seq_len=512,
    init_std=0.1,
    qk_norm=True,
)


@dataclass(frozen=True)
class Case:
    """What is trained: `recipe` in every linear layer, in `dtype`, `micros` micro-batches of 2 sequences a step."""

    recipe: str = "bf16"
    dtype: torch.dtype = torch.float32
    model: ModelConfig = field(default_factory=lambda: MODEL)
    tokens: int = 64
    micros: int = 2
    steps: int = 3
    documents: bool = True
    z_loss: float = 1e-3
    clip_norm: float = 1.0
    lr: float = 3e-3
    settings: dict[str, object] = field(default_factory=dict)  # of ParallelConfig
    comm: CommConfig = field(default_factory=CommConfig)

    def batch(self, step: int, micro: int) -> Batch:
        """Random tokens: every fifth target is left out, documents of 11 tokens where there are documents."""
        generator = torch.Generator().manual_seed(100 * step + micro)
        ids = torch.randint(self.model.vocab_size, (2, self.tokens + 1), generator=generator)
        targets = ids[:, 1:].clone()
        targets[:, ::5] = -100
        documents = (torch.arange(self.tokens).expand(2, -1) + 3 * micro) // 11
        return Batch(ids[:, :-1], targets, documents if self.documents else None)

    def __str__(self) -> str:
        return f"{self.recipe}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def num_targets(self) -> int:
        return 2 * self.micros * (self.tokens - -(-self.tokens // 5))


@dataclass
class Outcome:
    """What a run did; the same on all ranks."""

    losses: list[float]
    norms: list[float]  # of the gradient, before clipping
    gradients: dict[str, np.ndarray]  # of the first step, whole, by parameter name


def make(case: Case, shake: int = 0, **sizes: int) -> Engine:
    """The model on this process's world, laid out over axes of these sizes."""
    sizes = {"shard": 1, **sizes}
    config, world = ParallelConfig(**sizes, **case.settings), world_of(tuple(sizes.items()))
    with torch.device("meta"):
        model = build(case.model, case.dtype)
    precision = replace(load_precision(case.recipe), rules=(Rule("*", name_of(case.recipe)),))
    plan = Plan.of(model, precision, seed=7)
    plan.apply(model)
    if shake:
        Shake(shake, case).install(model)
    optimizer = partial(build_optimizer, config=OptimConfig())
    engine = parallelize(model, plan, world, config, case.comm, case.dtype, optimizer)
    engine.init_weights(3)
    return engine


@cache
def world_of(sizes: tuple[tuple[str, int], ...]) -> World:
    """One mesh a process and layout: its groups take longer to make than a step."""
    return start_world(ParallelConfig(**dict(sizes), timeout_s=30))


class Shake:
    """Errors as large as those of partial sums: in outputs of row-parallel and input gradients of column-parallel."""

    def __init__(self, seed: int, case: Case) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.size = 3 * 2**-9 if case.dtype == torch.bfloat16 else case.model.ffn_dim * 2**-24

    def install(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, (Attention, MLP)):
                (module.o_proj if isinstance(module, Attention) else module.down_proj).register_forward_hook(
                    self.output
                )
                module.register_forward_pre_hook(self.gradient)
        model.lm_head.register_forward_pre_hook(self.gradient)

    def shaken(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(x.shape, generator=self.generator).mul_(2).sub_(1)
        return (x.float() * (1 + self.size * noise)).to(x.dtype)

    def output(self, module, args, y):
        return self.shaken(y)

    def gradient(self, module, args):
        x = args[0].view_as(args[0])
        if x.requires_grad:
            x.register_hook(self.shaken)
        return x, *args[1:]


def name_of(recipe: str) -> str:
    """The first recipe of a precision file."""
    return next((name for name in load_precision(recipe).linear if name != "bf16"), "bf16")


def trained(case: Case, draws: int) -> list[Outcome]:
    """What one process does, and what it does with errors, in so many draws."""
    return [train(case, shake=seed) for seed in range(draws + 1)]


def train(case: Case, sizes: dict[str, int] | None = None, shake: int = 0) -> Outcome:
    """`case.steps` steps on this process's world."""
    engine = make(case, shake, **(sizes or {}))
    data_rank, data_size = engine.world.data
    losses, norms, gradients = [], [], {}
    for step in range(case.steps):
        engine.clock.step = step
        total = torch.zeros(())

        def loss(micro, logits, targets, total=total):
            loss_sum, z_sum = cross_entropy(logits, targets, case.z_loss, engine.vocab)
            if engine.world.counts_loss:
                total.add_(loss_sum.detach())
            return (loss_sum + z_sum) / case.num_targets

        engine.backward([(m, case.batch(step, m)) for m in range(data_rank, case.micros, data_size)], loss)
        if step == 0:
            gradients = {name: whole(p.grad) for name, p in engine.model.named_parameters()}
        torch.distributed.all_reduce(total)
        losses.append(total.item() / case.num_targets)
        norms.append(engine.clip(case.clip_norm).item())
        engine.update(case.lr)
    return Outcome(losses, norms, gradients)


def whole(x: torch.Tensor) -> np.ndarray:
    """The whole of a possibly sharded tensor, as numpy, which travels between processes by value."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().numpy().copy()


def deviations(one: Outcome, other: Outcome) -> dict[str, float]:
    """How far another run is from one process's, relative: the worst loss, and the first gradients by name."""
    assert one.gradients.keys() == other.gradients.keys()
    gradients = {
        name: np.linalg.norm(other.gradients[name] - g) / np.linalg.norm(g) for name, g in one.gradients.items()
    }
    return {"loss": max(abs(b / a - 1) for a, b in zip(one.losses, other.losses, strict=True)), **gradients}


def assert_agree(one: Outcome, other: Outcome, shaken: list[Outcome]) -> None:
    """Whether a layout did what one process does, up to rounding errors (see above)."""
    allowed = [deviations(one, draw) for draw in shaken]
    for what, found in deviations(one, other).items():
        bound = max(2**-20, 4 * max(draw[what] for draw in allowed))
        assert found <= bound, f"{what}: off by {found:.2e}, rounding explains {bound:.2e}"


def assert_same(one: Outcome, other: Outcome) -> None:
    """Whether two runs agree in every bit."""
    assert (one.losses, one.norms) == (other.losses, other.norms)
    for name, gradient in one.gradients.items():
        assert np.array_equal(gradient, other.gradients[name]), name
