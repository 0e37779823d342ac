"""An engine with random weights and batches of random tokens for a `Workload`, to measure memory and speed."""

import numpy as np
import torch
from torch import nn

from trivium.config.run import Adapter, Optimizer
from trivium.data.batch.pack import Batch, pack
from trivium.data.columns import FULL_WEIGHT, LOSS_WEIGHTS, Column
from trivium.engine.engine import Engine
from trivium.model import adapter
from trivium.model.quantize import NF4Linear
from trivium.model.qwen import INIT_STD, Linear, Qwen, init_weights
from trivium.plan.workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RandomStore:
    """Documents of random tokens; the last `supervised_share` of each is supervised."""

    def __init__(self, lengths: list[int], vocab_size: int, supervised_share: float) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.vocab_size = vocab_size
        self.supervised_share = supervised_share

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.random.default_rng(document).integers(0, self.vocab_size, int(self.lengths[document]))[start:stop]

    @property
    def columns(self) -> tuple[Column, ...]:
        return () if self.supervised_share == 1.0 else (LOSS_WEIGHTS,)

    def sequence_starts(self, document: int, start: int, stop: int) -> list[int]:
        return []

    def column(self, name: str, document: int, start: int, stop: int) -> np.ndarray:
        length = int(self.lengths[document])
        first = length - round(self.supervised_share * length)
        return np.where(np.arange(start, stop) >= first, FULL_WEIGHT, 0).astype(np.uint8)


def synthetic_engine(workload: Workload, device: torch.device | str = "cpu") -> Engine:
    """The model and optimizer of a workload, as in a run, with random weights."""
    config = Optimizer(lr=1e-5, weight_decay=0.1, state_dtype=workload.state_dtype)
    dtype = DTYPES[workload.compute_dtype]
    if workload.adapter is None:
        with torch.device(device):
            model = Qwen(workload.shape)
        init_weights(model, seed=0)
    else:
        model = frozen_model(workload, dtype, device)
        adapter.inject(model, workload.adapter, seed=0, token_ids=range(workload.num_token_rows))
    model.compute_dtype = dtype
    model.activation_checkpointing = workload.activation_checkpointing
    return Engine(model, config, (workload.adapter or Adapter()).loraplus_lr_ratio)


def frozen_model(workload: Workload, dtype: torch.dtype, device: torch.device | str) -> Qwen:
    """A frozen base model in the compute dtype or NF4, created one matrix at a time to save memory."""
    with torch.device("meta"):
        model = Qwen(workload.shape)
    for path, module in list(model.named_modules()):
        if workload.weights == "nf4" and isinstance(module, Linear) and path != "lm_head":
            bias = None
            if module.bias is not None:
                bias = nn.Parameter(torch.zeros_like(module.bias, dtype=dtype, device=device))
            weight = torch.randn(module.weight.shape, device=device)
            model.set_submodule(path, NF4Linear(weight, bias, dtype))
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                value = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, INIT_STD)
                module.register_parameter(name, nn.Parameter(value))
    return model.requires_grad_(False)


def synthetic_batches(workload: Workload, step: int = 0) -> list[Batch]:
    """The micro-batches of one device in one step, without padding."""
    length = round(workload.document_tokens or workload.seq_len)
    lengths = [min(length, workload.seq_len - start) for start in range(0, workload.seq_len, length)]
    lengths *= workload.micro_tokens // workload.seq_len
    # Each document has one more token, so that the last token of a sequence has a label too.
    store = RandomStore([length + 1 for length in lengths], workload.shape.vocab_size, workload.supervised_share)
    spans = np.array([(0, document, 0, length) for document, length in enumerate(lengths)], dtype=np.int64)
    return [pack([store], spans, workload.micro_tokens) for _ in range(workload.num_micro_batches)]
