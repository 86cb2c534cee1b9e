"""Everything between a `Run` and its first step: plan, folder, data, sharding, weights or checkpoint.

All that a user can get wrong is found in here and raised as a ValueError, on every rank alike; cheap checks come first.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lowprec.config import ComputeDtype, Run
from lowprec.data import Data, Loader, build_data
from lowprec.linear import Plan, load_precision
from lowprec.linear.verify import verify
from lowprec.model import Transformer, build
from lowprec.optim import build_optimizer, phases
from lowprec.parallel import EngineKind, World, parallelize
from lowprec.parallel.account import account
from lowprec.parallel.auto import propose, this_machine
from lowprec.parallel.job import job_of, uncuttable
from lowprec.parallel.layout import Job, Layout
from lowprec.parallel.tensor import refuse_scan
from lowprec.train import probe
from lowprec.train.checkpoint import Checkpoints, committed
from lowprec.train.console import Narrator
from lowprec.train.facts import Facts, facts_of
from lowprec.train.folder import Folder, open_folder, refuse_other_data
from lowprec.train.guard import Guard
from lowprec.train.oscillation import Oscillation, refuse
from lowprec.train.state import TrainState
from lowprec.train.watch import Watch

DTYPES = {ComputeDtype.bf16: torch.bfloat16, ComputeDtype.fp32: torch.float32}


@dataclass
class Session:
    """A run that is ready for its next step."""

    run: Run
    world: World
    plan: Plan
    data: Data
    state: TrainState
    folder: Folder
    checkpoints: Checkpoints
    narrator: Narrator
    facts: Facts
    watch: Watch

    @contextmanager
    def high_precision(self, on: bool = True) -> Iterator[None]:
        """Inside, if `on`, every layer runs unquantised; weights that were gathered as codes are gathered again."""
        if not on:
            yield
            return
        self.state.engine.regather()
        with self.plan.high_precision():
            yield
        self.state.engine.regather()


def check(run: Run) -> None:
    """Raises ValueError for settings that would only fail once data is read or the model built."""
    run.data.check()
    probe.refuse(run)
    phases(run.train.steps, run.schedule)
    build_optimizer(torch.nn.Linear(1, 1), run.optim)


def plan_model(run: Run) -> tuple[Transformer, Plan]:
    """The model on the meta device with its plan applied. Allocates nothing; raises ValueError on a bad rule."""
    with torch.device("meta"):
        model = build(run.model, dtype=DTYPES[run.train.dtype])
    plan = Plan.of(model, load_precision(run.precision), seed=run.seed)
    plan.apply(model)
    refuse(plan)
    return model, plan


def job_of_run(run: Run, plan: Plan, ranks_per_node: int, cpu: bool) -> Job:
    """What is trained, for accounts of memory and bytes."""
    return job_of(
        run.model,
        plan,
        run.comm,
        run.optim,
        micro_batch=run.train.micro_batch,
        seq_len=run.data.seq_len,
        global_batch=run.train.global_batch,
        dtype=DTYPES[run.train.dtype],
        documents=run.data.document_masking,
        cpu=cpu,
        ranks_per_node=ranks_per_node,
    )


def laid_out(run: Run, plan: Plan, ranks: int) -> tuple[Run, str]:
    """The run with the layout that `parallel=auto` takes for so many ranks, and why; as it is if it has one.

    The same on every rank. Raises ValueError if no layout fits, or if a recipe cannot be cut like this.
    """
    if not run.parallel.auto:
        refuse_scan(run.model, run.parallel.tp, run.parallel.cp)
        why = uncuttable(plan, run.data.seq_len)(Layout.of(run.parallel, ranks))
        if why:
            raise ValueError(why)
        return run, ""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    job = job_of_run(run, plan, per_node, cpu=not torch.cuda.is_available())
    proposal = propose(job, ranks, this_machine(per_node), run.parallel, uncuttable(plan, run.data.seq_len))
    return replace(run, parallel=proposal.layout.config(run.parallel)), f"parallel=auto: {proposal.why}"


def open_session(run: Run, world: World) -> Session | None:
    """Builds everything for the next step of a run, new or resumed; None if it is finished already.

    Raises ValueError, on every rank, if the folder holds another run or the data cannot be had.
    """
    t, narrator = run.train, Narrator(world.is_first, run.train.steps)
    data = build_data(run.data, run.seed)  # safe on all ranks at once: the first to come fills the cache
    vocab_size = data.vocab_size + -data.vocab_size % run.model.vocab_multiple
    if vocab_size != run.model.vocab_size:
        narrator.say(f"model.vocab_size: {vocab_size} for this tokenizer, instead of {run.model.vocab_size}")
        run = replace(run, model=replace(run.model, vocab_size=vocab_size))

    done = max(committed(Path(run.run.dir) / "checkpoints"), default=0)
    folder = open_folder(run, world, done)
    if done >= t.steps:
        if world.is_first and not (folder.path / "facts.json").exists():  # trained by a version that wrote none
            keep_facts(folder, facts_of(run, plan_model(run)[1], data.fingerprint))
        narrator.say(f"{folder.path} is finished: {done} of {t.steps} steps are done; nothing to do")
        return None

    refuse_other_data(folder, world, data.fingerprint, run.run.allow_change)

    model, plan = plan_model(run)
    make_optimizer = partial(build_optimizer, config=run.optim)
    engine = parallelize(model, plan, world, run.parallel, run.comm, DTYPES[t.dtype], make_optimizer)
    tokens, checked = t.micro_batch * run.data.seq_len, ""
    if plan.precision.verify:
        checked = verify(plan, tokens, DTYPES[t.dtype], world.device, world.control)
    loader = Loader(data.train, run.data.seq_len, t.global_batch, t.micro_batch, *world.data, run.seed, steps=t.steps)
    oscillation = Oscillation(plan, t.steps, DTYPES[t.dtype], world.stage)
    watch = Watch.of(run, plan, engine, world, data.validation, DTYPES[t.dtype])
    state = TrainState(engine, loader, plan, oscillation, Guard(run.guard, world.device), watch.controller)
    checkpoints = Checkpoints(folder.checkpoints, world, t.keep_last, t.keep_every, t.checkpoint_async, narrator.say)
    checkpoints.clean()
    if done:
        if missing := checkpoints.load(state, done):
            narrator.say(f"the checkpoint does not hold {len(missing)} of the recipe's memories, which begin anew")
        for what in watch.controller.dropped:
            narrator.say(f"{what}: raised by a rule that is no more; it is as planned again")
    else:
        engine.init_weights(run.seed)

    table = plan.table(tokens, DTYPES[t.dtype], world.device)
    table = "\n".join([table, *engine.remarks])
    if world.size > 1 and run.parallel.engine is EngineKind.fsdp:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        job = job_of_run(run, plan, per_node, world.device.type == "cpu")
        table += f"\n\n{account(job, Layout.of(run.parallel, world.size))}"
    facts = facts_of(run, plan, data.fingerprint)
    if world.is_first:
        folder.keep("plan.txt", table + "\n")
        keep_facts(folder, facts)
    narrator.say(table)
    if checked:
        narrator.say(checked)
    begins = f"resumes after step {state.step}" if done else "starts"
    narrator.say(f"{begins}, {t.steps} steps, {world.size} x {world.device.type}: {folder.path}")
    return Session(run, world, plan, data, state, folder, checkpoints, narrator, facts, watch)


def keep_facts(folder: Folder, facts: Facts) -> None:
    """Writes facts.json."""
    folder.keep("facts.json", json.dumps(facts, indent=1) + "\n")
