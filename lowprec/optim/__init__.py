"""Optimizers and learning rates: any `torch.optim`-like class over fp32 master weights, and pure functions of the step.

    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1))      # fused AdamW, two groups
    schedule = ScheduleConfig(shape=Shape.wsd, warmup_frac=0.02, decay_frac=0.2)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total_steps, schedule, peak_lr=1e-3)

The model's parameters are the master weights; neither module keeps any state of its own. `AdamWBf16` trains weights
that are kept in bf16 instead, by stochastic rounding.
"""

from .adamw_bf16 import AdamWBf16
from .build import ALLOWED, OptimConfig, build_optimizer, split_parameters
from .schedule import Decay, ScheduleConfig, Shape, learning_rate, phases

__all__ = [
    "ALLOWED",
    "AdamWBf16",
    "Decay",
    "OptimConfig",
    "ScheduleConfig",
    "Shape",
    "build_optimizer",
    "learning_rate",
    "phases",
    "split_parameters",
]
