"""AdamW's parameter groups, and the learning rate as a pure function of the step.

Holds no state of its own: the moments belong to torch's optimizer, the step to the loop. Used by the engine.
"""

import math

import torch
from torch import nn

from trivium.config import Optimizer, Schedule


def build_adamw(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over everything trainable; weight decay on matrices (two dimensions and more) only.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(step: int, num_steps: int, peak: float, schedule: Schedule) -> float:
    """The rate of optimizer step `step` (counted from 0) of a run of `num_steps`.

    The warm-up never has a rate of 0, and past the end the rate stays at the floor, whatever the form.

    Source: WSD (warm-up, stable, decay) from Hu et al. 2024, arXiv:2404.06395.
    """
    warmup_steps = round(schedule.warmup_share * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = num_steps - warmup_steps
    if schedule.kind == "wsd":
        decay_steps = min(decay_steps, round(schedule.decay_share * num_steps))
    done = (step - (num_steps - decay_steps)) / max(1, decay_steps - 1)
    done = min(1.0, max(0.0, done))
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.floor_share + (1.0 - schedule.floor_share) * remaining)
