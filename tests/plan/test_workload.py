"""Counts of parameters and bytes against PEFT's adapters, bitsandbytes' matrices and optimizer states."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.config.run import Adapter, Projection, Run, with_method_defaults
from trivium.engine.optim import state_tensors
from trivium.measure.synthetic import synthetic_engine
from trivium.model import catalog
from trivium.model.quantize import NF4Linear
from trivium.model.qwen import Qwen
from trivium.model.shape import FAMILIES, QwenShape
from trivium.plan.workload import Workload, moment_bytes, nf4_bytes, num_adapter_params, of_run

PUBLISHED = list(catalog.hub_ids())
SOME_TARGETS: list[list[Projection]] = [
    ["q_proj", "v_proj"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
]
SMALL = QwenShape("qwen2", 2100, 96, 260, 2, 6, 2, 16, tie_word_embeddings=False)


def work(shape: QwenShape, **changes: Any) -> Workload:
    values: dict[str, Any] = {
        "weights": "random",
        "adapter": None,
        "state_dtype": "fp32",
        "seq_len": 64,
        "micro_tokens": 128,
        "step_tokens": 128,
        "activation_checkpointing": False,
        "compute_dtype": "bf16",
        "device_type": "cpu",
    }
    return Workload(shape, **values | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_num_adapter_params_matches_peft(name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    shape = catalog.get(name)
    one_layer = QwenShape(**{**vars(shape), "num_hidden_layers": 1, "vocab_size": 64})
    for targets, dora in zip(SOME_TARGETS, (False, True), strict=True):
        with torch.device("meta"):
            model = Qwen(one_layer)
            config = LoraConfig(r=24, target_modules=list(targets), use_dora=dora)
            inject_adapter_in_model(config, model, "default")
        counted = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        adapter = Adapter(rank=24, targets=targets, dora=dora)
        assert num_adapter_params(shape, adapter) == shape.num_hidden_layers * counted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=5, dora=True)], ids=["everything", "adapter"])
@pytest.mark.parametrize("state_dtype", ["fp32", "8bit"])
def test_moment_bytes_match_optimizer(family: Any, adapter: Adapter | None, state_dtype: Any) -> None:
    shape = QwenShape(**{**vars(SMALL), "family": family})
    rows = 3 if adapter else 0
    workload = work(shape, adapter=adapter, state_dtype=state_dtype, num_token_rows=rows)
    engine = synthetic_engine(workload)
    found = state_tensors(engine.optimizer, engine.parameters)
    kept = {name: tensor for name, tensor in found.items() if not name.startswith("step.")}
    assert moment_bytes(workload) == sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert workload.num_trained_params == sum(p.numel() for p in engine.parameters.values())


@given(st.integers(1, 300), st.integers(1, 300))
def test_nf4_bytes_match_bitsandbytes(rows: int, columns: int) -> None:
    layer = NF4Linear(torch.ones(rows, columns), None, torch.bfloat16)
    assert nf4_bytes(rows * columns) == layer.num_bytes


def test_frozen_bytes_match_model() -> None:
    for weights in ("pretrained", "nf4"):
        workload = work(SMALL, weights=weights, adapter=Adapter(rank=2))
        model = synthetic_engine(workload).model
        packed = [module.num_bytes for module in model.modules() if isinstance(module, NF4Linear)]
        plain = [p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad]
        assert workload.frozen_bytes == sum(packed) + sum(plain)


def test_of_run_reads_run_file() -> None:
    values = {
        "method": "qlora",
        "name": "n",
        "model": "Qwen/Qwen3-0.6B",
        "data": {"sources": ["x.jsonl"], "seq_len": 512},
        "batch": {"tokens": 8192, "micro_tokens": 2048},
        "activation_checkpointing": True,
        "adapter": {"rank": 4},
        "optimizer": {"state_dtype": "8bit"},
    }
    run = Run.model_validate(with_method_defaults(values))
    made = of_run(run, catalog.get("Qwen3-0.6B"), None, "bf16", "gpu")
    assert (made.weights, made.state_dtype, made.activation_checkpointing) == ("nf4", "8bit", True)
    assert (made.seq_len, made.micro_tokens, made.num_micro_batches) == (512, 2048, 4)
    assert made.num_trained_params == num_adapter_params(made.shape, Adapter(rank=4))
