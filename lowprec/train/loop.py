"""The loop. Reads top to bottom.

    [ data · forward/backward · clip · update · evaluate · record · save ]* -> sample

Steps are counted twice: `state.step` is the number of steps done; the step being done has the index `state.step`,
which is what keys its learning rate, its place in the precision schedule and its random bits. The record of a step
bears the number of steps done after it: 1 .. train.steps.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from lowprec.config import GuardAction, to_dict
from lowprec.data import Step
from lowprec.model import count_parameters, cross_entropy, generate
from lowprec.optim import learning_rate
from lowprec.train.checkpoint import UNSAVED
from lowprec.train.evaluate import validation_losses
from lowprec.train.guard import Diverged, Verdict
from lowprec.train.metrics import MetricsLog, Record, Utilisation, finite, hardware_of, peak_memory_bytes
from lowprec.train.session import Session
from lowprec.train.signals import DIVERGED, REQUEUE, Stop
from lowprec.train.tracker import Tracker
from lowprec.train.watchdog import watched


def train(session: Session, stop: Stop) -> int:
    """Trains until `train.steps`, a stop or a divergence; returns the exit code (0, REQUEUE, DIVERGED, UNSAVED)."""
    run, t, state, folder, out = session.run, session.run.train, session.state, session.folder, session.narrator
    with ExitStack() as resources:
        metrics = resources.enter_context(MetricsLog(folder.metrics, state.step)) if session.world.is_first else None
        if metrics and run.probe.every:
            session.watch.log = resources.enter_context(MetricsLog(folder.probes, state.step))
        tracker = Tracker(
            run.monitor,
            run.name,
            folder.run_id,
            folder.path,
            to_dict(run) | {"facts": session.facts},
            out.say,
            session.world.is_first,
            state.step,
        )
        resources.callback(tracker.finish, 1)  # if an exception ends the run; the first call to finish counts
        resources.enter_context(out.progress(state.step))
        world, look = session.world, partial(progress, session, stop)
        try:
            with watched(world.rank, world.size, run.parallel.hang_s, look):
                reason = steps(session, stop, metrics, tracker)
        except Diverged as error:
            out.say(str(error))
            session.checkpoints.finish()
            tracker.alert("diverged", str(error))
            tracker.finish(DIVERGED)
            return DIVERGED
        unsaved = session.checkpoints.finish()  # not after the loss of a rank, for which it would wait
        if unsaved:
            out.say(f"{unsaved}: what came after the newest checkpoint is lost; see to that and start again")
            tracker.finish(UNSAVED)
            return UNSAVED
        tracker.saved()
        if state.step < t.steps:
            out.say(f"{reason}: stopped after step {state.step} of {t.steps}; the same command goes on from here")
            code = 0 if stop.cancelled else REQUEUE
            tracker.finish(code)
            return code
        if t.sample_tokens:
            out.say(sample(session))
        out.say(f"finished {t.steps} steps, {state.tokens} tokens: {folder.path}")
        tracker.finish(0)
    return 0


def steps(session: Session, stop: Stop, metrics: MetricsLog | None, tracker: Tracker) -> str | None:
    """Steps until the last one is done or a stop is asked for; returns the reason of a stop. Raises Diverged."""
    run, t, state, world, out = session.run, session.run.train, session.state, session.world, session.narrator
    guard, watch, fingerprint, raised = state.guard, Stopwatch(), session.plan.fingerprint(), dict(session.plan.raised)
    parameters = count_parameters(run.model)["total"]
    tokens = t.global_batch * run.data.seq_len
    use = Utilisation(session.plan, run.model, run.data.seq_len, tokens, world.size, hardware_of(world.device))
    reason = stop.poll(world)
    while state.step < t.steps and reason is None:
        done = train_step(session)
        if raised != session.plan.raised:
            raised, fingerprint = dict(session.plan.raised), session.plan.fingerprint()
        watch.lap(done.data_s)
        use.lap((state.step - 1) / t.steps)
        if done.verdict.what:
            what = report(session, done, metrics)
            if done.verdict.action is GuardAction.rollback:
                roll_back(session, metrics)
                tracker.rewind(state.step)
            if done.verdict.action is not GuardAction.keep:
                tracker.alert(done.verdict.action.name, what)
        if done.verdict.action is GuardAction.rollback:
            continue
        is_last = state.step == t.steps

        validation: Record = {}
        if is_last or (t.eval_every and state.step % t.eval_every == 0):
            guard.check()
            with watch.paused():
                validation = validation_losses(session, stop)

        if session.watch.due(state.step):
            guard.check()
        with watch.paused():
            probed = session.watch.look(state.step, state.tokens, session.high_precision)
        changes = [note(session, event, metrics) for event in probed.pop("events", [])]

        if is_last or validation or probed or done.reset or state.step % t.log_every == 0:
            guard.check()
            record: Record = {
                "step": state.step,
                "tokens": state.tokens,
                "loss": number(done.loss),
                "lr": done.lr,
                "grad_norm": number(done.grad_norm),
            }
            record |= watch.record(tokens)
            record |= use.record(record["step_s"])
            record |= {"mem_bytes": peak_memory_bytes(world.device), "plan": fingerprint}
            if world.size > 1 and state.engine.transport is not None:
                sent = sum(done.wire_bytes.values())
                record |= {"wire_bytes": done.wire_bytes, "wire_bytes_per_param": sent / parameters}
            record = finite(record | guard.record() | done.reset | validation | probed)
            if metrics:
                metrics.write(record)
                out.step(record)
                tracker.log(record)
                if changes:
                    tracker.alert("precision", "\n".join(changes))
                if probed:
                    with watch.paused():
                        tracker.probe(session.watch.newest)

        if tracker.cancelled:
            stop.cancel()
        reason = stop.poll(world)
        if is_last or reason or (t.checkpoint_every and state.step % t.checkpoint_every == 0):
            guard.check()
            if metrics:
                metrics.sync()
            with watch.paused():
                session.checkpoints.save(state)
                tracker.saved()
    return reason


def progress(session: Session, stop: Stop) -> tuple[int, ...]:
    """(steps done, and what the watchdog compares between ranks); read by another thread."""
    state, transport = session.state, session.state.engine.transport
    calls = transport.meter.calls if transport is not None and session.world.axis("pp").size == 1 else 0
    return state.step, stop.polls, state.loader.state_dict()["samples"], calls


@dataclass(frozen=True)
class Done:
    """What one step was: device scalars, so that the host need not wait for them."""

    loss: torch.Tensor  # fp32, nats
    grad_norm: torch.Tensor  # fp32, before clipping
    verdict: Verdict
    lr: float
    data_s: float  # waiting for data
    reset: Record  # of de-oscillation, {} where it did not act
    wire_bytes: dict[str, int]  # by collective


def train_step(session: Session) -> Done:
    """One optimizer step; advances the state."""
    run, t, state, plan = session.run, session.run.train, session.state, session.plan
    started_s = time.perf_counter()
    batch = state.loader.next_step()
    data_s = time.perf_counter() - started_s

    plan.at(state.step / t.steps)
    plan.clock.step = state.step
    state.engine.wire_bytes()  # what validation has sent is not the step's
    with session.high_precision(state.guard.raises(state.step)):
        loss = forward_backward(session, batch)
    grad_norm = state.engine.clip(t.clip_norm)
    verdict = state.guard.judge(state.step + 1, loss, grad_norm)
    lr = learning_rate(state.step, t.steps, run.schedule, run.optim.lr)
    state.oscillation.before_update(state.step)
    session.watch.before_update(state.step)
    if verdict.updates:
        state.engine.update(lr)
    else:
        state.engine.drop_gradients()
    session.watch.after_update(state.step)
    accept = torch.isfinite(loss) & torch.isfinite(grad_norm) & verdict.updates
    plan.end_step(state.step, accept, session.world.stage)
    reset = state.oscillation.after_update(state.step)
    state.engine.end_step(accept)

    state.step += 1
    state.tokens += t.global_batch * run.data.seq_len
    return Done(loss, grad_norm, verdict, lr, data_s, reset, state.engine.wire_bytes())


def report(session: Session, done: Done, metrics: MetricsLog | None) -> str:
    """Says what the guard decided, and writes it to events.jsonl."""
    state, verdict = session.state, done.verdict
    loss, norm, action = done.loss.item(), done.grad_norm.item(), verdict.action.name
    sentence = f"step {state.step}: {verdict.what} (loss {loss:.4g}, gradient norm {norm:.4g}): {action}"
    session.narrator.say(sentence)
    if metrics:
        event = {"step": state.step, "what": verdict.what, "action": action, "loss": f"{loss:g}",
                 "grad_norm": f"{norm:g}", "attempt": metrics.attempt} | state.guard.counts  # fmt: skip
        keep(session, event)
    return sentence


def note(session: Session, event: Record, metrics: MetricsLog | None) -> str:
    """Says what the controller decided, and writes it to events.jsonl."""
    sentence = f"step {event['step']}: {event['what']}: {event['action']} from here on"
    session.narrator.say(sentence)
    if metrics:
        keep(session, event | {"attempt": metrics.attempt})
    return sentence


def keep(session: Session, event: Record) -> None:
    """One line of events.jsonl."""
    with session.folder.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def roll_back(session: Session, metrics: MetricsLog | None) -> None:
    """Back to the newest checkpoint, with the data from there to here passed over; a collective. Raises Diverged."""
    state, bad_step, counts = session.state, session.state.step, dict(session.state.guard.counts)
    session.checkpoints.finish()
    target = session.checkpoints.latest()
    if target is None:
        raise Diverged(
            f"step {bad_step}: guard=rollback finds no checkpoint to go back to; set train.checkpoint_every, "
            "or choose guard=skip"
        )
    consumed = state.loader.state_dict()["samples"]
    session.checkpoints.load(state, target)
    consumed -= state.loader.state_dict()["samples"]  # what an earlier rollback passed over is in it
    passed = consumed // session.run.train.global_batch
    state.loader.skip(passed)
    state.guard.counts = counts
    if metrics:
        metrics.rewind(state.step)
    session.watch.rewind(state.step)
    session.narrator.say(f"back to step {state.step}; the data of {passed} steps is passed over")


def number(x: torch.Tensor) -> float | None:
    """A scalar for a record; what is not finite is null there."""
    value = x.item()
    return value if math.isfinite(value) else None


def forward_backward(session: Session, batch: Step) -> torch.Tensor:
    """Accumulates the gradient of the mean loss over the global batch; returns that mean (fp32 scalar).

    Losses are collected per micro-batch and added in their global order, so the number of ranks does not change the
    sum.
    """
    t, engine, world = session.run.train, session.state.engine, session.world
    losses_M = torch.zeros(t.global_batch // t.micro_batch, device=world.device)

    def loss(micro: int, logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        loss_sum, z_sum = cross_entropy(logits_BTV, targets_BT, t.z_loss, engine.vocab)
        if world.counts_loss:
            losses_M[micro] += loss_sum.detach()
        return (loss_sum + z_sum) / batch.num_targets

    engine.backward(batch.micros, loss)
    if world.size > 1:
        dist.all_reduce(losses_M)
    return losses_M.sum() / batch.num_targets


def sample(session: Session) -> str:
    """`train.sample_prompt` and what the model makes of it, in the run's precision; a collective."""
    t, tokenizer = session.run.train, session.data.tokenizer
    session.plan.clock.micro = 0
    prompt = tokenizer.encode(t.sample_prompt) or [tokenizer.eos_id]
    text = generate(
        session.state.engine.next_logits, prompt, t.sample_tokens, temperature=0.7, top_k=40, seed=session.run.seed,
        stop_token=tokenizer.eos_id, max_seq_len=session.run.model.max_seq_len,
    )  # fmt: skip
    return f"--- sample after {session.state.step} steps ---\n{t.sample_prompt}{tokenizer.decode(text)}\n---"


class Stopwatch:
    """Seconds per step since the last record, without what was done while it was paused."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since_s, self._steps, self._data_s = time.perf_counter(), 0, 0.0

    def lap(self, data_s: float) -> None:
        """One step is done, of which `data_s` went by waiting for data."""
        self._steps += 1
        self._data_s += data_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused_s = time.perf_counter()
        yield
        self._since_s += time.perf_counter() - paused_s

    def record(self, tokens_per_step: int) -> Record:
        """The timing keys of a record; starts anew."""
        step_s = (time.perf_counter() - self._since_s) / self._steps
        timing = {"tokens_per_s": tokens_per_step / step_s, "step_s": step_s, "data_s": self._data_s / self._steps}
        self._restart()
        return timing
