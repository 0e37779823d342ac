"""Model shapes: parameter counts, validation, and config.json."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.qwen import Linear, Qwen
from trivium.model.shape import FAMILIES, QwenShape

SHAPE = QwenShape("qwen3", 512, 64, 160, 2, 4, 2, 32, True)
# As Qwen/Qwen2.5-7B-Instruct publishes it: no head_dim, the older keys for rotary positions and dtype.
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


# As HuggingFaceTB/SmolLM2-135M-Instruct publishes it.
PUBLISHED_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}


@pytest.mark.parametrize("name", catalog.names())
def test_hf_config_round_trip(name: str) -> None:
    shape = catalog.get(name)
    assert QwenShape.from_hf_config(shape.to_hf_config()) == shape


@pytest.mark.parametrize("name", catalog.names())
def test_to_hf_config_is_read_by_transformers(name: str) -> None:
    shape = catalog.get(name)
    config = AutoConfig.for_model(**shape.to_hf_config())
    assert QwenShape.from_hf_config(config.to_dict()) == shape
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": shape.rope_theta}


def test_from_hf_config_reads_a_published_config() -> None:
    assert QwenShape.from_hf_config(PUBLISHED) == catalog.get("Qwen2.5-7B-Instruct")
    assert QwenShape.from_hf_config(PUBLISHED_LLAMA) == catalog.get("SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["qwen2"]}, "model_type"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map'"),
        ({"trust_remote_code": True}, "'trust_remote_code'"),
        ({"_attn_implementation": "kernels-community/evil"}, "'_attn_implementation'"),
        ({"_experts_implementation_internal": "x"}, "_implementation"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary positions"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2}}, "rotary positions"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 2}}, "rotary positions"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "Remove the scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "choose a model without"),
        ({"rope_scaling": "yarn"}, "expected a mapping"),
        ({"rope_theta": None}, "no rope_theta"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        (
            {"model_type": "llama", "num_attention_heads": 24, "head_dim": 128},
            "not a multiple of its 24 attention heads",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "3584"}, "head_dim"),
        ({"hidden_size": 3585}, "head_dim"),
        ({"num_hidden_layers": 28.0}, "num_hidden_layers is 28.0"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_from_hf_config_refuses_unsupported_settings(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        QwenShape.from_hf_config(PUBLISHED | change)
    assert "\n" not in str(raised.value)


def test_from_hf_config_accepts_inert_keys() -> None:
    inert = {"quantization_config": None, "auto_map": None, "_attn_implementation": None, "rope_scaling": {}}
    assert QwenShape.from_hf_config(PUBLISHED | inert) == catalog.get("Qwen2.5-7B-Instruct")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"num_hidden_layers": -1},
        {"head_dim": 33},
        {"num_key_value_heads": 3},
        {"family": "qwen4"},
        {"rope_theta": float("inf")},
        {"rms_norm_eps": 0.0},
        {"intermediate_size": 1.5},
    ],
)
def test_shape_refuses_impossible_numbers(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(SHAPE, **change)


def test_shape_counts_computed_by_hand() -> None:
    assert SHAPE.num_embedding_params == 512 * 64
    attention = 64 * 128 * 2 + 64 * 64 * 2
    assert SHAPE.num_layer_matmul_params == attention + 3 * 64 * 160
    assert SHAPE.num_matmul_params == 512 * 64 + 2 * SHAPE.num_layer_matmul_params
    assert SHAPE.num_params == SHAPE.num_matmul_params + 2 * (2 * 64 + 2 * 32) + 64
    assert replace(SHAPE, tie_word_embeddings=False).num_params == SHAPE.num_params + 512 * 64


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_matrices_equal_those_of_a_block(family):
    shape = QwenShape(family, 64, 48, 80, 1, 6, 2, 16, tie_word_embeddings=True)
    with torch.device("meta"):
        block = Qwen(shape).model.layers[0]
    linears = {
        name.rpartition(".")[2]: (*module.weight.shape, module.bias is not None)
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    }
    table = {
        matrix.name: (matrix.out_features, matrix.in_features, matrix.has_bias) for matrix in shape.layer_matrices()
    }
    assert linears == table
    assert all(matrix.copies == matrix.active == 1 for matrix in shape.layer_matrices())
