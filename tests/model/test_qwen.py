"""The network compared with transformers, packed documents with single ones, and initialization."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trivium.model import catalog, hf
from trivium.model.qwen import Documents, Qwen, init_weights
from trivium.model.shape import QwenShape

LENGTHS = (23, 1, 40, 7)

# All families, tied and not, every way of sharing heads, heads * head_dim above and below hidden, odd depths.
CONFIGURATIONS = {
    "qwen2-tied-gqa": QwenShape("qwen2", 211, 64, 176, 2, 4, 2, 16, True),
    "qwen2-untied-mha": QwenShape("qwen2", 211, 48, 96, 3, 3, 3, 16, False),
    "qwen2-tied-mqa": QwenShape("qwen2", 97, 64, 128, 1, 4, 1, 16, True),
    "qwen2-untied-wide-heads": QwenShape("qwen2", 211, 32, 96, 5, 4, 2, 16, False),
    "qwen2-narrow-heads": QwenShape("qwen2", 211, 64, 96, 3, 2, 1, 8, True, rope_theta=1e4),
    "qwen2-coarse-eps": QwenShape("qwen2", 130, 40, 72, 2, 5, 5, 8, False, rms_norm_eps=1e-3),
    "qwen3-tied-gqa": QwenShape("qwen3", 211, 64, 176, 2, 4, 2, 16, True),
    "qwen3-untied-mha": QwenShape("qwen3", 211, 48, 96, 3, 3, 3, 16, False),
    "qwen3-untied-mqa": QwenShape("qwen3", 97, 64, 128, 1, 8, 1, 8, False),
    "qwen3-tied-wide-heads": QwenShape("qwen3", 211, 32, 96, 5, 4, 2, 32, True),
    "qwen3-narrow-heads": QwenShape("qwen3", 211, 64, 96, 3, 2, 1, 8, True, rope_theta=1e4),
    "qwen3-coarse-eps": QwenShape("qwen3", 130, 40, 72, 2, 5, 1, 64, False, rms_norm_eps=1e-3),
    "llama-tied-gqa": QwenShape("llama", 211, 48, 128, 3, 3, 1, 16, True, rope_theta=1e5, rms_norm_eps=1e-5),
    "llama-untied-mha": QwenShape("llama", 211, 64, 96, 2, 4, 4, 32, False, rope_theta=1e4),
    "ladder-7k": catalog.get("ladder-7k"),
    "ladder-1m": catalog.get("ladder-1m"),
}

# Published totals, as the model cards' safetensors report them.
PUBLISHED_PARAMS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def transformers_model(shape: QwenShape) -> PreTrainedModel:
    config = shape.to_hf_config()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")


def random_transformers_model(shape: QwenShape, seed: int = 0) -> PreTrainedModel:
    """Weights at which nothing hides: large ones, norms away from 1, biases away from 0."""
    model = transformers_model(shape)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.3 if name.endswith("bias") else 0.15)
    return model


def documents_of(lengths: tuple[int, ...], padding: int = 3) -> tuple[torch.Tensor, Documents]:
    bounds = (0, *accumulate(lengths))
    cu_seqlens = torch.tensor(bounds + (bounds[-1],) * padding, dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return positions, Documents(cu_seqlens, bounds, max(lengths))


def random_row(shape: QwenShape, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def small_model(seed: int = 0, **changes: object) -> Qwen:
    model = Qwen(replace(CONFIGURATIONS["qwen3-tied-gqa"], **changes))
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("shape", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_loss_and_gradients_equal_transformers(shape: QwenShape, tmp_path: Path) -> None:
    theirs = random_transformers_model(shape)
    theirs.save_pretrained(tmp_path)
    assert replace(hf.read_shape(tmp_path), max_position_embeddings=4096) == shape
    ours = Qwen(hf.read_shape(tmp_path))
    hf.load_weights(ours, tmp_path)

    tokens = random_row(shape)
    positions, documents = documents_of(LENGTHS)
    our_logits = F.linear(ours(tokens, positions, documents), ours.head_weight)
    their_logits = torch.cat([theirs(document[None]).logits[0] for document in tokens.split(LENGTHS)])
    labels = tokens.roll(-1)
    our_loss, their_loss = F.cross_entropy(our_logits, labels), F.cross_entropy(their_logits, labels)
    our_loss.backward()
    their_loss.backward()

    assert their_logits.std() > 0.5
    torch.testing.assert_close(our_logits, their_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(our_loss, their_loss, atol=0, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_published_shapes_have_the_published_parameters(name: str) -> None:
    shape = catalog.get(name)
    with torch.device("meta"):
        ours = {key: tuple(tensor.shape) for key, tensor in Qwen(shape).named_parameters()}
        theirs = {key: tuple(tensor.shape) for key, tensor in transformers_model(shape).named_parameters()}
    assert ours == theirs
    assert shape.num_params == PUBLISHED_PARAMS[name] == sum(torch.Size(size).numel() for size in ours.values())


@pytest.mark.parametrize("name", [name for name in catalog.names() if name.startswith("ladder")])
def test_ladder_counts_equal_those_of_the_tensors(name: str) -> None:
    shape = catalog.get(name)
    with torch.device("meta"):
        model = Qwen(shape)
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    projections = [p for key, p in model.named_parameters() if key.endswith("_proj.weight")]
    assert shape.num_matmul_params == sum(p.numel() for p in projections) + model.head_weight.numel()


def test_packed_documents_equal_single_documents() -> None:
    model = small_model()
    tokens = random_row(model.shape)
    positions, documents = documents_of(LENGTHS)
    packed = model(tokens, positions, documents).split(LENGTHS)
    for document, hidden in zip(tokens.split(LENGTHS), packed, strict=True):
        alone = model(document, *documents_of((len(document),)))
        torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_attention_stays_inside_a_document(changed: int) -> None:
    model = small_model()
    positions, documents = documents_of(LENGTHS)
    tokens = random_row(model.shape)
    before = model(tokens, positions, documents).split(LENGTHS)
    other = list(tokens.split(LENGTHS))
    other[changed] = (other[changed] + 1) % model.shape.vocab_size
    after = model(torch.cat(other), positions, documents).split(LENGTHS)
    for index in range(len(LENGTHS)):
        assert torch.equal(before[index], after[index]) == (index != changed)


def test_attention_is_causal() -> None:
    model = small_model()
    tokens = random_row(model.shape, lengths=(32,))
    changed = tokens.clone()
    changed[20] = (changed[20] + 1) % model.shape.vocab_size
    row = documents_of((32,))
    before, after = model(tokens, *row), model(changed, *row)
    assert torch.equal(before[:20], after[:20])
    assert not torch.equal(before[20:], after[20:])


def test_bf16_compute_keeps_fp32_weights_and_gradients() -> None:
    shape = CONFIGURATIONS["qwen3-tied-gqa"]
    theirs = random_transformers_model(shape).to(torch.bfloat16)
    ours = Qwen(shape)
    ours.load_state_dict({name: value.float() for name, value in theirs.state_dict().items() if name != hf.HEAD})
    ours.compute_dtype = torch.bfloat16
    tokens = random_row(shape, lengths=(40,))
    hidden = ours(tokens, *documents_of((40,)))
    expected = theirs.model(tokens[None]).last_hidden_state[0]
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float() - expected.float()).norm() / expected.float().norm() < 0.02
    hidden.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in ours.parameters())


def test_init_weights_depend_only_on_seed_and_name() -> None:
    first = dict(small_model(seed=7).named_parameters())
    torch.manual_seed(123)
    again = dict(small_model(seed=7, tie_word_embeddings=False).named_parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = dict(small_model(seed=8).named_parameters())
    matrices = [name for name, parameter in first.items() if parameter.dim() == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert not torch.equal(
        first["model.layers.0.self_attn.k_proj.weight"], first["model.layers.0.self_attn.v_proj.weight"]
    )


def test_init_weights_have_the_documented_deviation() -> None:
    model = Qwen(QwenShape("qwen2", 512, 128, 352, 8, 4, 2, 32, False))
    init_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.05, name
            assert abs(parameter.mean().item()) < expected / 20, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["qwen2-tied-gqa", "qwen3-tied-wide-heads", "llama-tied-gqa", "ladder-1m"])
def test_gpu_attention_equals_single_documents(name: str) -> None:
    model = Qwen(CONFIGURATIONS[name])
    init_weights(model, seed=0)
    tokens = random_row(model.shape)
    positions, documents = documents_of(LENGTHS)
    expected = model(tokens, positions, documents)
    model.to("cuda").compute_dtype = torch.bfloat16
    on_gpu = replace(documents, cu_seqlens=documents.cu_seqlens.cuda())
    hidden = model(tokens.cuda(), positions.cuda(), on_gpu).float().cpu()
    assert (hidden - expected).norm() / expected.norm() < 0.02
