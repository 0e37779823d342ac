"""AdamW with its parameter groups and checkpoint tensors, and the learning-rate schedule as a function of the step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trivium.config.run import Optimizer, Schedule
from trivium.errors import ConfigError


def build_adamw(model: nn.Module, config: Optimizer, loraplus_lr_ratio: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, with weight decay on those of two or more dimensions.

    The `lr_ratio` of a group multiplies its learning rate: `loraplus_lr_ratio` for LoRA's B matrices, 1 for the others.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; LoRA+, Hayou et al. 2024, arXiv:2402.12354.
    Raises: ConfigError when 8-bit state is configured without bitsandbytes.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in trainable if parameter.dim() >= 2]
    groups = [
        {"params": [p for name, p in matrices if ".lora_B." not in name], "weight_decay": config.weight_decay},
        {"params": [p for _, p in trainable if p.dim() < 2], "weight_decay": 0.0},
        {
            "params": [p for name, p in matrices if ".lora_B." in name],
            "weight_decay": config.weight_decay,
            "lr_ratio": loraplus_lr_ratio,
        },
    ]
    groups = [{"lr_ratio": 1.0, **group} for group in groups if group["params"]]
    numbers: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.state_dtype == "fp32":
        return torch.optim.AdamW(groups, **numbers, fused=True)
    return eight_bit_adamw(model, groups, numbers, is_paged=config.state_dtype == "paged-8bit")


def eight_bit_adamw(
    model: nn.Module, groups: list[dict[str, Any]], numbers: dict[str, Any], is_paged: bool
) -> torch.optim.Optimizer:
    """AdamW with blockwise 8-bit moments; those of embeddings stay fp32, since they are unstable in 8 bits.

    Source: Dettmers et al. 2021, arXiv:2110.02861.
    """
    try:
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager, PagedAdamW8bit
    except ImportError as error:
        raise ConfigError(
            "8-bit optimizer.state_dtype needs bitsandbytes, which is not installed. Install it with `pip install "
            "'trivium[gpu]'`, or set optimizer.state_dtype: fp32."
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer = (PagedAdamW8bit if is_paged else AdamW8bit)(groups, **numbers)
    optimizer.check_overrides()
    return optimizer


def state_tensors(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """AdamW's state of each parameter as `exp_avg.NAME`, initialized if needed.

    The tensors share memory with the optimizer, except the step count of bitsandbytes, which is an int: see
    `take_steps`.
    """
    places = {
        id(parameter): (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state and isinstance(optimizer, torch.optim.AdamW):
            # As in torch's first step.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        elif not state:
            group, group_index, index = places[id(parameter)]
            optimizer.init_state(group, parameter, group_index, index)
        for key, value in state.items():
            if not key.startswith("qmap"):  # a constant table
                found[f"{key}.{name}"] = value if torch.is_tensor(value) else torch.tensor(value)
    return found


def take_steps(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore the step counts that are ints in the optimizer's state."""
    for name, parameter in parameters.items():
        if not torch.is_tensor(optimizer.state[parameter]["step"]):
            optimizer.state[parameter]["step"] = int(tensors[f"step.{name}"])


def learning_rate(step: int, num_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of a run of `num_steps`.

    The first warmup step has a rate above 0. After the last step, decaying schedules stay at their minimum.

    Source: WSD (warmup, stable, decay) from Hu et al. 2024, arXiv:2404.06395.
    """
    warmup_steps = round(schedule.warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = num_steps - warmup_steps
    if schedule.kind == "wsd":
        decay_steps = min(decay_steps, round(schedule.decay_ratio * num_steps))
    done = (step - (num_steps - decay_steps)) / max(1, decay_steps - 1)
    done = min(1.0, max(0.0, done))
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - done
    return peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * remaining)
