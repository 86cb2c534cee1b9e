"""Validation loss: fixed batches, the same on every rank count, with the recipe on and with it off.

The gap between the two tells what quantisation costs at evaluation from what training in it cost the weights.
"""

import torch
import torch.distributed as dist

from lowprec.data import IGNORED
from lowprec.model import cross_entropy
from lowprec.train.metrics import Record
from lowprec.train.session import Session
from lowprec.train.signals import Stop


def validation_losses(session: Session, stop: Stop) -> Record:
    """`val_loss` and, if wished, `val_loss_high_precision` for a record; {} without data or when told to stop
    (the validation that ends the run is finished first)."""
    losses = {}
    if session.data.validation:
        losses["val_loss"] = validation_loss(session, stop, high_precision=False)
        if session.run.train.eval_high_precision:
            losses["val_loss_high_precision"] = validation_loss(session, stop, high_precision=True)
        session.state.engine.regather()  # the next step's recipes may be others: there was no backward pass to free
    return {} if None in losses.values() else losses


@torch.no_grad()
def validation_loss(session: Session, stop: Stop, high_precision: bool) -> float | None:
    """Mean cross-entropy per target (nats) over the validation batches, or None if a stop is asked for; a collective.

    Ranks take the batches in turn. Sums are gathered per batch and added in batch order, so the number of ranks does
    not change the result.
    """
    ends = session.state.step >= session.run.train.steps  # without its last losses a run would count as finished
    engine, plan, world, batches = session.state.engine, session.plan, session.world, session.data.validation
    data_rank, data_size = world.data
    sums_N2 = torch.zeros(len(batches), 2, dtype=torch.float64, device=world.device)  # (loss sum, targets) per batch
    with session.high_precision(high_precision):
        for first in range(0, len(batches), data_size):
            if not ends and stop.poll(world):
                return None
            mine = first + data_rank
            batch = batches[min(mine, len(batches) - 1)]  # a rank without a batch still takes part in the gathers
            plan.clock.micro = mine
            logits_BTV = engine.logits(batch)
            if logits_BTV is not None:
                targets_BT = engine.part(batch.targets)
                loss_sum, _ = cross_entropy(logits_BTV, targets_BT, group=engine.vocab)
                if mine < len(batches) and world.counts_loss:
                    sums_N2[mine] = torch.stack([loss_sum.double(), (targets_BT != IGNORED).sum().double()])
    if world.size > 1:
        dist.all_reduce(sums_N2)
    loss_sum, num_targets = sums_N2.sum(0).tolist()
    return loss_sum / max(num_targets, 1)
