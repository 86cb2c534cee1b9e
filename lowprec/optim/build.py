"""Build an optimizer: two groups, any class of an allow-listed package, fp32 master weights.

The parameters handed over are the fp32 (perhaps sharded) parameters of the model: they *are* the master weights, and
the bf16 or FP4 copies that compute sees are made from them in every step. So an update of relative size 1e-5
survives, which bf16, with its 8 significant bits, would round away. The optimizer's state is fp32 too unless its
class decides otherwise.

Weight decay (arXiv:1711.05101) pulls matrices only: norms, biases and other vectors are left alone, and so are
embeddings (with a head tied to them) unless `decay_embeddings` is set, since a rare token's row would decay without
being trained.

An optimizer is named by `_target_`; its constructor gets lr, weight_decay, betas, eps and `kwargs`, and an argument
it does not know is an error before training, not a silent loss.
"""

import difflib
import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from .adamw_bf16 import AdamWBf16

ALLOWED = (
    "torch.optim.",
    "torchao.optim.",
    "bitsandbytes.optim.",
    "pytorch_optimizer.",
    "heavyball.",
    "lowprec.optim.",
)
_FUSED = ("torch.optim.AdamW", "torch.optim.Adam")  # one kernel per step on CPU and CUDA; DTensor has no rule for SGD's


@dataclass
class OptimConfig:
    """Settings of the optimizer; every field is a key of `recipes/optim/*.yaml`."""

    _target_: str = "torch.optim.AdamW"  # class, in one of the packages of ALLOWED
    lr: float = 1.0e-3  # peak; the schedule scales it
    weight_decay: float = 0.1  # of the decay group; the other group has 0
    betas: list[float] | None = field(default_factory=lambda: [0.9, 0.95])  # None = not passed to the class
    eps: float | None = 1.0e-8  # None = not passed to the class
    decay_embeddings: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the class

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr is {self.lr}: it must be positive.")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay is {self.weight_decay}: it must be 0 or positive.")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {list(self.betas)}: each must be at least 0 and below 1.")
        if self.eps is not None and self.eps <= 0:
            raise ValueError(f"optim.eps is {self.eps}: it must be positive, or null for the class's default.")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`, each once (a tied head is the embedding).

    Groups: matrices with weight decay, then everything else with none; an empty group is left out. torch's fused
    kernel is used where the class offers one, unless kwargs names fused or foreach. Raises ValueError, in one
    sentence, for a target outside ALLOWED, not installed or not an optimizer, for arguments it does not know, and for
    parameters that are not fp32 (AdamWBf16: nor bf16).
    """
    cls = _resolve(config._target_)
    decay, rest = split_parameters(model, config.decay_embeddings, getattr(cls, "parameter_dtypes", (torch.float32,)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": weight_decay}
        for params, weight_decay in ((decay, config.weight_decay), (rest, 0.0))
        if params
    ]
    if issubclass(cls, AdamWBf16):  # whose random bits are keyed by name
        groups = [group | {"params": [(names[p], p) for p in group["params"]]} for group in groups]
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.betas is not None:
        arguments["betas"] = tuple(config.betas)
    if config.eps is not None:
        arguments["eps"] = config.eps
    known, open_ended = _parameters(cls)
    if config._target_ in _FUSED and not {"fused", "foreach"} & set(config.kwargs):
        arguments["fused"] = True
    arguments |= config.kwargs
    unknown = [name for name in arguments if name not in known]
    if unknown and not open_ended:
        raise ValueError(
            f"{config._target_} does not take {unknown}{_did_you_mean(unknown[0], known)}: its arguments are {known} "
            "(betas and eps of optim are left out with null, others are given in optim.kwargs)."
        )
    try:
        return cls(groups, **arguments)
    except TypeError as error:  # a wrong type, or a name refused behind **kwargs
        raise ValueError(f"{config._target_} refused its arguments {sorted(arguments)}: {error}.") from error


def split_parameters(
    model: nn.Module, decay_embeddings: bool, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed) trainable parameters of the model, each once, in the model's order.

    Raises ValueError for a parameter of none of `dtypes`.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in dtypes:
            raise ValueError(
                f"Parameter {name} is {parameter.dtype}: the optimizer needs fp32 master weights, so build the model "
                "in fp32 and let the precision plan cast (or keep bf16 weights alone, with lowprec.optim.AdamWBf16)."
            )
        is_decayed = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
        (decay if is_decayed else rest).append(parameter)
    if not decay and not rest:
        raise ValueError("The model has no trainable parameter: set requires_grad on those to train.")
    return decay, rest


def _resolve(target: str) -> type[torch.optim.Optimizer]:
    if not target.startswith(ALLOWED):
        raise ValueError(
            f"optim._target_ {target!r} is not in an allowed package: it must begin with one of {list(ALLOWED)}."
        )
    path, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"optim._target_ {target!r} needs the module {error.name!r}, which is not there: install it, or choose "
            "torch.optim.AdamW."
        ) from None
    classes = {n: c for n, c in vars(module).items() if _is_optimizer(c)}
    cls = getattr(module, name, None)  # some packages make their classes on first access
    if not _is_optimizer(cls):
        hint = _did_you_mean(name, list(classes))
        raise ValueError(f"optim._target_ {target!r} is no optimizer{hint}: {path} has {sorted(classes)}.")
    return cls


def _is_optimizer(value: object) -> TypeGuard[type[torch.optim.Optimizer]]:
    base = torch.optim.Optimizer
    return inspect.isclass(value) and issubclass(value, base) and value is not base


def _parameters(cls: type) -> tuple[list[str], bool]:
    """Names of the constructor's arguments without self and params, and whether it takes any other (**kwargs)."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _did_you_mean(word: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
