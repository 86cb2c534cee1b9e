"""AdamW for weights that are kept in bf16, without an fp32 master: every update is rounded stochastically.

    model = model.bfloat16()
    optimizer = AdamWBf16(model.named_parameters(), lr=1e-3, moments="bf16")

The equation is :func:`lowprec.numerics.update.adamw` in fp32, then :func:`~lowprec.numerics.update.stochastic_bf16`.
To nearest, an update of less than 2^-9 of its weight would be lost; like this it arrives in the mean
(arXiv:2010.06192, arXiv:2502.20566).

Memory, bytes a parameter: 2 weight + 2 gradient + 8 moments in fp32 = 12, or 4 moments in bf16 = 8, where an fp32
master takes 16 and its bf16 copy 2 more.

The random bits are those of a `Stream` under the parameter's name (its place in the groups if they have no names) and
the number of the step, at the element's index in the whole parameter: a resumed run rounds as the run would have, and
so do other numbers of ranks, where a parameter is sharded along its first axis (FSDP2).  fp32 parameters, such as
norms, are updated as by torch's AdamW.  On a GPU with Triton the step is one kernel a parameter; elsewhere plain torch,
which the kernel equals bit for bit.

What this is not: part of a run by recipe, whose models are fp32 masters (`optim.build`) and would save nothing; nor as
accurate as a master: every step adds a rounding's noise, up to 2^-7 of a weight, which the gradient must pull back.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lowprec.numerics.stream import Stream, Window
from lowprec.numerics.update import AdamW, adamw, stochastic_bf16

_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PIECE = 1 << 18  # weights that plain torch updates at a time, which bounds its temporaries


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) that rounds bf16 weights stochastically.

    Args:
        params: parameters, named parameters or groups of either, in bf16 or fp32.
        moments: "fp32" or "bf16"; the latter are rounded stochastically too.
        seed: of the random bits.
        kernels: use the Triton kernel; None: for tensors on a GPU, where Triton is installed.

    Raises:
        ValueError: for other dtypes, layouts, or numbers out of range.
    """

    parameter_dtypes = (torch.float32, torch.bfloat16)  # what `optim.build` lets through to this class

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "fp32",
        seed: int = 0,
        kernels: bool | None = None,
    ) -> None:
        if moments not in _MOMENTS:
            raise ValueError(f"Moments in {moments!r} are unknown: write fp32 or bf16.")
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"lr {lr}, eps {eps}, weight_decay {weight_decay} or betas {betas} is out of range: betas must be at"
                " least 0 and below 1, eps positive, the others not negative."
            )
        self._seed, self._moments, self._kernels = seed, _MOMENTS[moments], kernels
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for _, name, parameter in self._named():
            if parameter.dtype not in self.parameter_dtypes or not parameter.is_contiguous():
                raise ValueError(
                    f"Parameter {name} is {parameter.dtype}{'' if parameter.is_contiguous() else ', strided'}: "
                    "AdamWBf16 updates contiguous bf16 and fp32 parameters, so cast or copy it."
                )
            _local(name, parameter)

    def _named(self) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
        """(group, name, parameter), in order."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                yield group, name, parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, name, parameter in self._named():
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise ValueError(f"The gradient of {name} is sparse: build its embedding with sparse=False.")
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)  # a number of the host, as torch's own optimizers
                state["exp_avg"] = torch.zeros_like(parameter, dtype=self._moments)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._moments)
            state["step"] += 1
            count = int(state["step"])
            beta1, beta2 = group["betas"]
            update = AdamW(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], count)
            weight, first = _local(name, parameter)
            others = (_local(name, t)[0] for t in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
            self._update(update, Stream(self._seed, count, 0, name), first, weight, *others)
        return loss

    def _update(self, update: AdamW, stream: Stream, first: int, *tensors: Tensor) -> None:
        """In place, on (weight, gradient, mean, square) of this rank."""
        weight, grad, mean, square = tensors
        grad = grad.contiguous()
        on_gpu = weight.device.type == "cuda" and _has_triton()
        if self._kernels or (self._kernels is None and on_gpu):
            from lowprec.kernels.triton.update import adamw_

            adamw_(weight, grad, mean, square, update, stream, first)
            return
        flat = [t.view(-1) for t in (weight, grad, mean, square)]
        for start in range(0, weight.numel(), _PIECE):
            parts = [t[start : start + _PIECE] for t in flat]
            kept = (parts[0], *parts[2:])
            new = adamw(parts[0].float(), parts[1].float(), parts[2].float(), parts[3].float(), update)
            for role, part, value in zip(("weight", "exp_avg", "exp_avg_sq"), kept, new):
                if part.dtype == torch.bfloat16:
                    within = Window((1, 1 << 62), first + start)
                    bits = stream.bits(role, (1, part.numel()), part.device, within)
                    value = stochastic_bf16(value, bits[0])
                part.copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimizer, but moments keep their dtype, which torch would cast to the parameter's."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, (_, _, parameter) in zip(saved, self._named(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if key in state_dict["state"]:
                    value = state_dict["state"][key][name]
                    self.state[parameter][name] = value.to(device=parameter.device, dtype=self._moments, copy=True)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _local(name: str, t: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor, and the index of its first element in the whole."""
    if not isinstance(t, DTensor):
        return t, 0
    cut = [axis for axis, placement in enumerate(t.placements) if not placement.is_replicate()]
    if len(cut) > 1 or (cut and t.placements[cut[0]] != Shard(0)):
        raise ValueError(
            f"Parameter {name} is laid out as {t.placements}: AdamWBf16 knows parameters that are sharded once, along "
            "their first axis, so use fp32 masters with tensor parallelism."
        )
    if not cut:
        return t.to_local(), 0
    rows = -(-t.shape[0] // t.device_mesh.size(cut[0]))  # of a rank, the last ones fewer
    first = min(rows * t.device_mesh.get_local_rank(cut[0]), t.shape[0])
    return t.to_local(), first * (t.numel() // t.shape[0] if t.shape[0] else 0)
