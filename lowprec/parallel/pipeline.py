"""Pipeline parallel: every rank holds some of the blocks, and the micro-batches of a step flow through the ranks.

    stage 0: embed, blocks   ->   stage 1: blocks   ->   ...   ->   stage S-1: blocks, norm, lm_head, loss

1F1B (arXiv:2006.09503): stage s runs S - s micro-batches forward, then one backward and one forward in turn, so it
keeps the activations of at most S - s of the M micro-batches. A rank waits for others (pp - 1) / M of the time that it
computes. Interleaved 1F1B (arXiv:2104.04473) gives every rank v stages, stage s to rank s % pp: the wait shrinks, and
the traffic grows, v times. Both schedules, and the order of sends and receives that does not deadlock, are torch's
(`torch.distributed.pipelining`); a stage is sharded by FSDP2 over the ranks that hold the same blocks.

A model that is cut this way gives the numbers of one that is not: every micro-batch meets the same products on the same
tensors, hidden states travel in the compute dtype that they have anyway, gradients are added in the order of
micro-batches, and random bits are keyed by the number of the micro-batch at hand, not by the order of work. Parameters
keep the names they have in the whole model.

What this is not: a schedule for evaluation. One batch after another goes through all stages while the others wait.
Schedules that split the backward pass in two (zero bubble) gain where dgrad and wgrad are two products of one graph;
a quantised layer is one node, and they are left out. Embedding and head on two stages cannot share a weight.
"""

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from lowprec.data import Batch
from lowprec.linear import Plan
from lowprec.model import ModelConfig, Transformer
from lowprec.numerics import Clock
from lowprec.parallel.engine import Engine, Loss
from lowprec.parallel.mesh import Axis, World

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lowprec.parallel.transport import Transport


def deal(layers: int, stages: int) -> list[range]:
    """The blocks of every stage: contiguous, as even as possible.

    Where some stages get one less, the last is the first of them, since it has the head and the loss to compute; then
    the one that has the embedding; then the others, from the end.
    """
    counts = [layers // stages] * stages
    for stage in [*range(1, stages - 1), 0, stages - 1][: layers % stages]:
        counts[stage] += 1
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts)]


def check_stages(model: ModelConfig, pp: int, virtual_stages: int) -> None:
    """Raises ValueError if the model cannot be cut into pp x virtual_stages stages."""
    stages = pp * virtual_stages
    if virtual_stages < 1:
        raise ValueError(f"parallel.virtual_stages={virtual_stages}: a rank has at least 1 stage")
    if pp == 1 and virtual_stages > 1:
        raise ValueError(
            f"parallel.virtual_stages={virtual_stages} gives every rank of a pipeline that many stages, but there is "
            "no pipeline: set parallel.virtual_stages=1, or parallel.pp to at least 2"
        )
    if pp > 1 and model.tie_embeddings:
        raise ValueError(
            f"parallel.pp={pp} puts the embedding on the first stage and the head on the last, where they cannot be "
            "one weight: set model.tie_embeddings=false, or parallel.pp=1"
        )
    if model.layers < stages:
        raise ValueError(
            f"model.layers={model.layers} are fewer than the {stages} pipeline stages (parallel.pp={pp} x "
            f"parallel.virtual_stages={virtual_stages}), each of which needs a block: make fewer stages"
        )


def check_micros(pp: int, virtual_stages: int, micros: int, micro_batch: int, data: int) -> None:
    """Raises ValueError if so many micro-batches a step and data-parallel rank do not fill a pipeline.

    1F1B needs at least pp of them; interleaved 1F1B runs them in micros // pp rounds, which must be of one size.
    micro_batch: sequences in each; data: data-parallel ranks. Both serve to name a batch that fits.
    """

    def fits(count: int) -> bool:
        return count >= pp and (virtual_stages == 1 or count % (count // pp) == 0)

    if pp > 1 and not fits(micros):
        good = next(count for count in range(micros, micros + 2 * pp) if fits(count))
        rounds = "" if micros < pp else f", and in {micros // pp} rounds of one size (parallel.virtual_stages > 1)"
        raise ValueError(
            f"a pipeline of parallel.pp={pp} ranks takes at least {pp} micro-batches a step and data-parallel rank"
            f"{rounds}, but there are {micros}: choose for example train.global_batch={good * micro_batch * data}"
        )


class Elsewhere(nn.Module):
    """Stands for a part of the model that another stage holds. It has no parameters and cannot be called."""


class Stage(nn.Module):
    """Some blocks of a model, and what comes before the first block and after the last; the unit that FSDP2 shards.

    Its modules are those of the model, which keeps them; a block has the same name, `layers.<number>`, in both.
    """

    def __init__(self, model: Transformer, index: int, blocks: list[range]) -> None:
        """blocks: of every stage; this is the one of that index."""
        super().__init__()
        self.index, self.is_first, self.is_last = index, index == 0, index == len(blocks) - 1
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in blocks[index]})
        self.ends = nn.ModuleList([model.embed] * self.is_first + [model.norm, model.lm_head] * self.is_last)
        self.context, self.begin, self.end = model.context, model.begin, model.end

    def forward(self, x: Tensor, tokens_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """x: what the stage before returned, x_BTC of this rank's tokens; for the first stage tokens_BT.

        tokens_BT, document_ids_BT: int64, whole rows, on every stage (they tell positions and the mask). Returns x_BTC,
        the last stage logits_BTV, in the compute dtype.
        """
        context = self.context(tokens_BT, document_ids_BT)
        if self.is_first:
            x = self.begin(x)
        for layer in self.layers.values():
            x = layer(x, context)
        return self.end(x) if self.is_last else x


def cut(model: Transformer, plan: Plan, pp: Axis, virtual_stages: int) -> list[Stage]:
    """This rank's stages, in order; what other ranks hold is taken out of `model` and `plan`. None where pp is 1.

    Raises ValueError if the model cannot be cut like this.
    """
    check_stages(model.config, pp.size, virtual_stages)
    if pp.size == 1:
        return []
    count = pp.size * virtual_stages
    blocks = deal(model.config.layers, count)
    stages = [Stage(model, index, blocks) for index in range(pp.rank, count, pp.size)]
    here = {id(module) for stage in stages for module in [*stage.layers.values(), *stage.ends]}
    parts = {"embed": model.embed, "norm": model.norm, "lm_head": model.lm_head}
    parts |= {f"layers.{i}": block for i, block in enumerate(model.layers)}
    for name, module in parts.items():
        if id(module) not in here:
            model.set_submodule(name, Elsewhere())
    plan.keep({name for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    return stages


class Runner(PipelineStage):
    """torch's runtime of a stage, with two differences.

    It tells the clock which micro-batch is at hand, in forward and in backward, where recomputation runs forward again.
    And it holds a buffer for what it receives only while that is in use, where torch's holds one for every micro-batch
    of the step, which would be more memory than 1F1B saves.
    """

    def __init__(
        self, stage: Stage, stages: int, axis: Axis, device: torch.device, clock: Clock, hidden: Tensor
    ) -> None:
        """hidden: on the meta device, like what stages pass on."""
        tokens = torch.empty(hidden.shape[:2], dtype=torch.int64, device="meta")
        super().__init__(
            stage, stage.index, stages, device, tokens if stage.is_first else hidden, hidden, group=axis.group
        )  # the last stage's output is named like the others', but nothing is sent
        self.clock, self.hidden = clock, hidden
        self.numbers: list[int] = []  # of the step's micro-batches
        self.received_bytes = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.clock.micro = self.numbers[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self.clock.micro = self.numbers[bwd_chunk_id]
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._hold(self.args_recv_info[bwd_chunk_id], False)
        self._hold(self.grad_recv_info[bwd_chunk_id], False)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._hold(self.args_recv_info[fwd_chunk_id], True)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._hold(self.grad_recv_info[bwd_chunk_id], True)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_backward_infra(*args, **kwargs)
        for infos in [*self.args_recv_info.values(), *self.grad_recv_info.values()]:
            self._hold(infos, False)
        return prepared

    def _hold(self, infos: Any, held: bool) -> None:
        for info in infos:
            if not info.is_root_arg:
                info.buffer = torch.empty_like(self.hidden, device=self.device) if held else None
                self.received_bytes += held * self.hidden.nbytes


class Pipeline(Engine):
    """The engine of a pipeline. Only ranks of the last stage have logits and see losses.

    Attributes:
        stages: this rank's, in order.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: "Optimizer",
        world: World,
        clock: Clock,
        transport: "Transport",
        stages: list[Stage],
        timeout_s: float,
    ) -> None:
        """stages: of `cut`, sharded and materialised; timeout_s: a neighbour that is waited for longer ends the run."""
        super().__init__(model, optimizer, world, clock, transport)
        self.stages = stages
        lines = world.mesh.mesh.flatten(1).T.tolist()  # pp is the outermost axis
        group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(seconds=timeout_s))
        self.axis = replace(world.axis("pp"), group=group)
        self._schedule: Schedule1F1B | ScheduleInterleaved1F1B | None = None
        self._runners: list[Runner] = []
        self._shape: tuple[int, ...] = ()  # (micro-batches, sequences, tokens) the schedule is made for
        self._loss: Loss | None = None

    def backward(self, micros: list[tuple[int, Batch]], loss: Loss) -> None:
        """As Engine.backward; sums over ranks come once, after a stage's last micro-batch."""
        inputs = [self._inputs(batch) for _, batch in micros]
        tokens = torch.cat([tokens_BT for tokens_BT, _ in inputs])
        rows: dict[str, Any] = {"tokens_BT": tokens}
        if all(ids is not None for _, ids in inputs):
            rows["document_ids_BT"] = torch.cat([ids for _, ids in inputs if ids is not None])
        targets = torch.cat([self.part(batch.targets) for _, batch in micros])
        schedule = self._scheduled(len(micros), *inputs[0][0].shape)
        for runner in self._runners:
            runner.numbers, runner.received_bytes = [number for number, _ in micros], 0
        self._loss = loss
        schedule.step(tokens, target=targets, return_outputs=False, **rows)
        self._count(sum(runner.received_bytes for runner in self._runners))

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor | None:
        """As Engine.logits; None on all stages but the last."""
        return self._through(*self._inputs(batch))

    def _next(self, tokens_1T: Tensor, wanted_T: Tensor) -> Tensor:
        """As Engine._next; what the last stage has, on all."""
        logits_1TV = self._through(tokens_1T, None)
        if logits_1TV is not None:
            next_V = logits_1TV[0, wanted_T].float().sum(dim=0)
        else:
            next_V = torch.empty(self.model.config.vocab_size // self.world.axis("tp").size, device=self.world.device)
        dist.broadcast(next_V, group=self.axis.group, group_src=self.axis.size - 1)
        return next_V

    def _through(self, tokens_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor | None:
        """A batch through all stages in their order -> logits, where the last stage is."""
        x, group, ranks = tokens_BT, self.axis.group, self.axis.size
        for stage in self.stages:
            if not stage.is_first:
                x = torch.empty_like(self._hidden(*tokens_BT.shape), device=self.world.device)
                dist.recv(x, group=group, group_src=(stage.index - 1) % ranks)
                self._count(x.nbytes)
            x = stage(x, tokens_BT, document_ids_BT)
            if stage.is_last:
                return x
            dist.send(x, group=group, group_dst=(stage.index + 1) % ranks)
        return None

    def _count(self, received_bytes: int) -> None:
        if self.transport is not None:
            self.transport.meter.add("pipeline_send", received_bytes)

    def _scheduled(self, micros: int, sequences: int, tokens: int) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """The schedule for so many micro-batches of this shape."""
        if self._schedule is None or self._shape != (micros, sequences, tokens):
            virtual = len(self.stages)
            check_micros(self.axis.size, virtual, micros, sequences, self.world.data[1])
            hidden = self._hidden(sequences, tokens).requires_grad_()
            count, device = self.axis.size * virtual, self.world.device
            self._runners = [Runner(stage, count, self.axis, device, self.clock, hidden) for stage in self.stages]
            arguments: dict[str, Any] = {"loss_fn": self._loss_of, "scale_grads": False}
            if virtual > 1:
                self._schedule = ScheduleInterleaved1F1B([*self._runners], micros, **arguments)
            else:
                self._schedule = Schedule1F1B(self._runners[0], micros, **arguments)
            self._shape = (micros, sequences, tokens)
        return self._schedule

    def _loss_of(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of the micro-batch that just went forward."""
        assert self._loss is not None
        return self._loss(self.clock.micro, logits_BTV, targets_BT)

    def _hidden(self, sequences: int, tokens: int) -> Tensor:
        """What stages pass on for a batch of whole rows, x_BTC of this rank's tokens, on the meta device.

        Tensor parallelism cuts a sequence once more between the matrices, and so between stages.
        """
        rows_BT = self.model.part(torch.empty(sequences, tokens, device="meta"), 1)
        shape = (sequences, rows_BT.shape[1] // self.world.axis("tp").size, self.model.config.dim)
        return torch.empty(shape, dtype=self.model.dtype, device="meta")
