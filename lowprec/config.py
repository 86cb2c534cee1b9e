"""Run: everything that defines a training run, as one tree of dataclasses.

Each package owns the dataclass of its part (`ModelConfig`, `DataConfig`, ...). `TrainConfig` and `MonitorConfig` live
here and not in `train/`, because `train` imports this module and imports go one way only. The tree is also the schema
that Hydra checks YAML and command lines against: a key that is not a field, or a value of another type, does not
compose.

Any count of steps may be said in tokens, as papers do: ``steps: ${steps:10e12}`` becomes the steps of 10e12 tokens with
this `train.global_batch` and `data.seq_len`, whatever they are set to.

`precision` alone is a free mapping: its own strict reader is `lowprec.linear.load_precision`.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lowprec.comm import CommConfig
from lowprec.data import DataConfig
from lowprec.model import ModelConfig
from lowprec.optim import OptimConfig, ScheduleConfig
from lowprec.parallel import EngineKind, ParallelConfig, Recompute
from lowprec.parallel.pipeline import check_micros, check_stages


class ComputeDtype(Enum):
    """The dtype of activations and of the weights' compute copies. Masters and gradient sums are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class WandbMode(Enum):
    online = "online"
    offline = "offline"
    disabled = "disabled"


class GuardAction(Enum):
    """What is done about a step that is not sound (see :mod:`lowprec.train.guard`)."""

    keep = "keep"
    skip = "skip"
    rollback = "rollback"
    raise_precision = "raise_precision"
    stop = "stop"


@dataclass
class GuardConfig:
    """When a step is not sound, and what is done about it."""

    on_nonfinite: GuardAction = GuardAction.stop
    on_spike: GuardAction = GuardAction.keep
    spike_sigmas: float = 6.0  # standard deviations above the mean of the last `window` sound steps
    window: int = 50  # steps
    raise_steps: int = 100  # raise_precision: so many steps run unquantised
    max_rollbacks: int = 5  # then the run stops


@dataclass
class TrainConfig:
    """The loop. Batches are counted in sequences of `data.seq_len` tokens; a count of 0 switches a habit off."""

    steps: int = 1000
    global_batch: int = 16  # sequences per optimizer step, over all ranks
    micro_batch: int = 8  # sequences per forward pass; tensor scales span one micro-batch, so it changes the result
    dtype: ComputeDtype = ComputeDtype.bf16
    clip_norm: float = 1.0  # largest L2 norm of the gradient; 0 = no clipping
    z_loss: float = 0.0  # weight of log(Z)^2
    log_every: int = 1  # steps
    eval_every: int = 0  # steps; 0 = at the end only
    eval_high_precision: bool = True  # validate a second time with every layer unquantised
    checkpoint_every: int = 0  # steps; the end of the run is always saved
    checkpoint_async: bool = False  # write in the background while training goes on
    keep_last: int = 2  # newest checkpoints to keep
    keep_every: int = 0  # checkpoints at multiples of this many steps are kept for ever
    time_limit_s: float = 0.0  # after this long: finish the step, save, exit with the requeue code
    sample_prompt: str = ""  # printed with its continuation at the end
    sample_tokens: int = 0


@dataclass
class MonitorConfig:
    wandb: WandbMode = WandbMode.disabled
    project: str = "lowprec"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    checkpoints: bool = False  # W&B: each checkpoint as an artifact that refers to its path
    cancel_s: float = 60.0  # W&B, online: how often the tag `cancel` is looked for, in seconds; 0 = never
    tensorboard: bool = False  # event files in the run folder
    csv: bool = False  # metrics.csv beside metrics.jsonl


@dataclass
class ProbeRule:
    """One product of a layer goes to higher precision while a measure of its probe is out of bounds."""

    match: str  # layers, as in precision.rules
    gemm: str  # fprop | dgrad | wgrad
    measure: str  # of the product (sqnr_db, bias, cosine), or of its operand (see lowprec/linear/measure.py)
    operand: str = "out"  # out = the product; x | w | dy
    below: float | None = None  # raise when the measure is below this; give this or `above`
    above: float | None = None  # raise when it is above this
    back: float | None = None  # lower again when the measure has come back beyond this; null = never
    patience: int = 1  # probes in a row that must agree, for raising and for lowering
    to: str = "bf16"  # the recipe of the precision file whose product is used instead


@dataclass
class ProbeConfig:
    """What is measured inside the run (see :mod:`lowprec.train.probe`)."""

    every: int = 0  # steps; 0 = never
    layers: str = "*"  # which, as in precision.rules
    sequences: int = 1  # of the validation data: the side batch
    tokens: int = 1024  # of the side batch that are kept for each layer; 0 = all
    window: int = 8  # last steps before a probe in which the weights' motion is followed; 0 = not
    rules: list[ProbeRule] = field(default_factory=list)


@dataclass
class RunFolder:
    dir: str = "runs/${name}"
    allow_change: bool = False  # resume although settings that decide the result have changed since


@dataclass
class Run:
    name: str = "run"
    seed: int = 0
    run: RunFolder = field(default_factory=RunFolder)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


def _steps_of_tokens(tokens: Any, *, _root_: DictConfig) -> int:
    """``${steps:TOKENS}``: tokens / (train.global_batch * data.seq_len), to the nearest step, at least 1."""
    try:
        number = float(str(tokens).replace("_", ""))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"${{steps:{tokens}}} is no number of tokens: write for example ${{steps:10e12}}")
    tokens_per_step = _root_.train.global_batch * _root_.data.seq_len
    if tokens_per_step < 1:
        raise ValueError(f"train.global_batch={_root_.train.global_batch} and data.seq_len must be at least 1")
    return max(1, round(number / tokens_per_step))


OmegaConf.register_new_resolver("steps", _steps_of_tokens, replace=True)


def load(config: DictConfig) -> Run:
    """The composed configuration as plain dataclasses. Raises ValueError where two settings contradict each other."""
    run = OmegaConf.to_object(config)
    assert isinstance(run, Run), "compose with the schema `Run` as the first entry of the defaults list"
    t = run.train
    positive = {"train.steps": t.steps, "train.global_batch": t.global_batch, "train.micro_batch": t.micro_batch,
                "train.log_every": t.log_every, "train.keep_last": t.keep_last,
                "guard.window": run.guard.window, "guard.raise_steps": run.guard.raise_steps}  # fmt: skip
    for key, value in positive.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    natural = {"train.eval_every": t.eval_every, "train.checkpoint_every": t.checkpoint_every,
               "train.keep_every": t.keep_every, "train.clip_norm": t.clip_norm, "train.z_loss": t.z_loss,
               "train.time_limit_s": t.time_limit_s, "train.sample_tokens": t.sample_tokens,
               "guard.spike_sigmas": run.guard.spike_sigmas,
               "guard.max_rollbacks": run.guard.max_rollbacks}  # fmt: skip
    for key, number in natural.items():
        if number < 0:
            raise ValueError(f"{key}={number} must not be negative (0 switches it off)")
    if t.global_batch % t.micro_batch:
        raise ValueError(f"train.global_batch={t.global_batch} is not a multiple of train.micro_batch={t.micro_batch}")
    run.model.vocab_size += -run.model.vocab_size % run.model.vocab_multiple
    if run.data.seq_len > run.model.max_seq_len:
        raise ValueError(f"data.seq_len={run.data.seq_len} is longer than model.max_seq_len={run.model.max_seq_len}")
    run.comm.check()
    if run.parallel.engine is EngineKind.deepspeed and run.comm != CommConfig():
        raise ValueError(
            "comm= chooses what FSDP2 sends; DeepSpeed sends by its own settings: leave comm=fp32 and set, for "
            "example, parallel.deepspeed.communication_data_type=bf16"
        )
    if run.parallel.engine is EngineKind.fsdp and run.parallel.deepspeed:
        raise ValueError(
            f"parallel.deepspeed.{next(iter(run.parallel.deepspeed))} is a setting of DeepSpeed, which is not chosen: "
            "choose parallel=deepspeed_zero1, 2 or 3, or leave it out"
        )
    if run.precision.get("save") == "codes" and run.parallel.recompute is Recompute.full:
        raise ValueError(
            "precision.save=codes and parallel.recompute=full: recomputation keeps no inputs, so their codes would be "
            "kept in addition; choose one of the two"
        )
    return run


def check_world(run: Run, ranks: int) -> None:
    """Raises ValueError if so many ranks cannot be laid out, or the micro-batches of a step not be dealt out evenly."""
    sizes = run.parallel.sizes(ranks)
    data, t = sizes["replicate"] * sizes["shard"], run.train
    micros = t.global_batch // t.micro_batch
    if micros % data:
        raise ValueError(
            f"a step has {micros} micro-batches (train.global_batch={t.global_batch} / "
            f"train.micro_batch={t.micro_batch}), which {data} data-parallel ranks cannot share evenly: "
            f"make it a multiple of {data}, e.g. train.global_batch={t.micro_batch * data * -(-micros // data)}"
        )
    check_stages(run.model, sizes["pp"], run.parallel.virtual_stages)
    check_micros(sizes["pp"], run.parallel.virtual_stages, micros // data, t.micro_batch, data)


# Settings that may differ when a run is continued: they change neither what is computed nor in which order (the guard
# only where it acts, and it is changed to rescue a run).
_HARMLESS = ("name", "run", "guard", "parallel", "monitor", "data.cache_dir", "train.log_every", "train.eval_every",
             "train.eval_high_precision", "train.checkpoint_every", "train.checkpoint_async", "train.keep_last",
             "train.keep_every", "train.time_limit_s", "train.sample_prompt", "train.sample_tokens")  # fmt: skip


def changes(before: Run, now: Run) -> dict[str, tuple[Any, Any]]:
    """Settings that decide a run's result and differ: {"optim.lr": (old, new), ...}. Empty = may be resumed."""
    harmless = _HARMLESS if before.probe.rules or now.probe.rules else (*_HARMLESS, "probe")
    old, new = _leaves(before), _leaves(now)
    differing = {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }
    return {k: v for k, v in differing.items() if not any(k == h or k.startswith(h + ".") for h in harmless)}


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if is_dataclass(node):
        node = {f.name: getattr(node, f.name) for f in fields(node)}
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        k: v
        for key, child in node.items()
        for k, v in _leaves(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def to_yaml(run: Run) -> str:
    """`run` as YAML that `from_yaml` reads back; what is saved as config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def from_yaml(text: str) -> Run:
    """Inverse of `to_yaml`. Raises ValueError if the text has keys or values that this version does not know."""
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.create(text)))
    except OmegaConfBaseException as error:
        raise ValueError(f"the saved config.yaml is not one of this version: {str(error).splitlines()[0]}") from error
    assert isinstance(run, Run)
    return run


def to_dict(run: Run) -> dict[str, Any]:
    """`run` as nested dicts of plain values (enums by name)."""
    plain = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
