"""NF4 weights compared with bitsandbytes and transformers: packing, gradients, memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trivium.config.run import Adapter
from trivium.errors import ConfigError
from trivium.model import adapter, hf
from trivium.model.quantize import NF4Linear, load_quantized, quantized_bytes
from trivium.model.qwen import Documents, Qwen, init_weights
from trivium.model.shape import QwenShape

# Qwen2.5 has biases; rows of 176 and 48 values are not multiples of the block size 64.
SHAPES = {
    "qwen2-tied": QwenShape("qwen2", 211, 64, 192, 2, 4, 2, 16, True),
    "qwen3-untied": QwenShape("qwen3", 211, 64, 128, 2, 4, 2, 32, False),
    "llama-tied": QwenShape("llama", 211, 64, 128, 2, 4, 2, 16, True, rope_theta=1e5, rms_norm_eps=1e-5),
    "qwen2-untied-odd-blocks": QwenShape("qwen2", 211, 48, 176, 2, 3, 1, 16, False),
}
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(0))

LOADING = """
import os, resource, sys, threading
from pathlib import Path
import torch
import bitsandbytes.functional
from trivium.model import hf
from trivium.model.quantize import NF4Linear, load_quantized, quantized_bytes
from trivium.model.qwen import Qwen

torch.set_num_threads(1)
NF4Linear(torch.randn(64, 64), None, torch.bfloat16)
with torch.device("meta"):
    model = Qwen(hf.read_shape(Path(sys.argv[1])))
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
load_quantized(model, Path(sys.argv[1]), torch.bfloat16, "cpu")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(peak - before, quantized_bytes(model))
"""


def row_of(length: int) -> tuple[torch.Tensor, Documents]:
    return torch.arange(length), Documents(torch.tensor([0, length], dtype=torch.int32), (0, length), length)


def logits(model: Qwen) -> torch.Tensor:
    return model.logits(model(TOKENS, *row_of(len(TOKENS))))


def write_model(folder: Path, shape: QwenShape, dtype: torch.dtype = torch.float32) -> Path:
    """Weights as large as trained ones, with biases that do something."""
    model = Qwen(shape)
    init_weights(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.mul_(5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    hf.save_folder(model, folder, None, dtype)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen:
    with torch.device("meta"):
        model = Qwen(hf.read_shape(folder))
    return load_quantized(model, folder, dtype, "cpu")


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), SHAPES[request.param])


def unpacked_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' packed values, looked up and scaled one block after the other."""
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: weight.numel()]
    return (state.code[codes.long()] * scales.repeat_interleave(64)[: weight.numel()]).view(weight.shape)


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (64, 176), (3, 22), (16, 16), (3000, 1024)])
def test_nf4_packing_equals_bitsandbytes(size: tuple[int, int]) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(2))
    layer = NF4Linear(weight, None, torch.float32)
    assert torch.equal(layer.weight, unpacked_by_hand(weight))
    assert (layer.weight - weight).abs().mean() < 0.09  # a deviation of 1 in 16 levels
    sixteen = NF4Linear(weight, None, torch.bfloat16).weight
    assert sixteen.dtype == torch.bfloat16 and torch.equal(sixteen, layer.weight.bfloat16())


def test_nf4_takes_little_more_than_four_bits_per_weight() -> None:
    layer = NF4Linear(torch.randn(2048, 1024), None, torch.bfloat16)
    assert 4.125 <= layer.num_bytes * 8 / (2048 * 1024) < 4.14


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "llama-tied"])
def test_load_quantized_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, SHAPES[name])
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    theirs.train()  # in evaluation bitsandbytes turns to a bf16 kernel on CPUs that have one
    plain = Qwen(SHAPES[name])
    hf.load_weights(plain, folder)
    ours = logits(load(folder))
    torch.testing.assert_close(ours, theirs(TOKENS[None]).logits[0], atol=1e-5, rtol=0)
    assert (ours - logits(plain)).abs().max() > 1e-2


def test_load_quantized_is_deterministic(folder: Path) -> None:
    first, second = load(folder), load(folder)
    assert torch.equal(logits(first), logits(second)) and torch.equal(logits(first), logits(first))
    packed = {name: buffer for name, buffer in first.named_buffers() if name.endswith("packed")}
    assert len(packed) == 14
    assert all(torch.equal(buffer, second.get_buffer(name)) for name, buffer in packed.items())


def test_load_quantized_quantizes_only_projections(folder: Path) -> None:
    model = load(folder, torch.bfloat16)
    quantized = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert quantized == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.compute_dtype == torch.bfloat16 == logits(model).dtype
    plain = Qwen(model.shape)
    hf.load_weights(plain, folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name).bfloat16()), name


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_through_nf4_weights_equal_plain_ones(folder: Path, dora: bool) -> None:
    packed = load(folder)
    plain = adapter.merge(packed)
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-6, rtol=0)
    gradients = []
    for model in (packed, plain):
        adapter.inject(model, Adapter(rank=4, dora=dora), seed=1, token_ids=[7])
        with torch.no_grad():  # B starts at zero, where A has no gradient yet
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(3))
        torch.nn.functional.cross_entropy(logits(model), TOKENS.roll(-1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0, name
        assert (gradient - gradients[1][name]).norm() < 1e-5 * gradient.norm(), name


def test_nf4_backward_keeps_no_unpacked_weight() -> None:
    layer = NF4Linear(torch.randn(512, 256), None, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda nothing: nothing):
        layer(torch.randn(3, 256, requires_grad=True))
    assert sum(kept) < 512 * 256


def test_moving_an_nf4_model_moves_its_scales(folder: Path) -> None:
    model = load(folder).to("meta")
    layer = next(module for module in model.modules() if isinstance(module, NF4Linear))
    state = layer.state
    assert {tensor.device.type for tensor in (layer.packed, state.absmax, state.offset, state.state2.absmax)} == {
        "meta"
    }


def test_load_quantized_refuses_a_folder_of_another_shape(folder: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Qwen(QwenShape("qwen3", 211, 32, 64, 1, 2, 1, 16, True))
    with pytest.raises(ConfigError, match="do not fit"):
        load_quantized(model, folder, torch.float32, "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_load_quantized_names_weights_that_are_not_finite(folder: Path, tmp_path: Path) -> None:
    """Packed in four bits, a NaN would become an ordinary number."""
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(folder / hf.WEIGHTS)
    tensors[name][5, 3] = float("nan")
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    save_file(tensors, tmp_path / hf.WEIGHTS)
    with torch.device("meta"):
        model = Qwen(hf.read_shape(folder))
    with pytest.raises(ConfigError, match=f"a NaN in {name}, first in row 5;"):
        load_quantized(model, tmp_path, torch.float32, "cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_load_quantized_needs_the_quantized_size_and_one_layer(tmp_path: Path) -> None:
    shape = QwenShape("qwen3", 4096, 1024, 3072, 6, 16, 8, 128, True)
    model = Qwen(shape).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    hf.save_folder(model, tmp_path, None, torch.bfloat16)
    assert (tmp_path / hf.WEIGHTS).stat().st_size > 190e6
    del model
    output = subprocess.run([sys.executable, "-c", LOADING, tmp_path], capture_output=True, text=True, check=True)
    needed, quantized = map(int, output.stdout.split())
    one_layer = 4 * shape.num_layer_matmul_params  # in full precision
    assert quantized < 60e6
    assert needed < 1.2 * quantized + one_layer, f"{needed / 1e6:.0f} MB for {quantized / 1e6:.0f} MB"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nf4_on_gpu_equals_cpu(folder: Path) -> None:
    with torch.device("meta"):
        model = Qwen(hf.read_shape(folder))
    model = load_quantized(model, folder, torch.float32, "cuda")
    positions, documents = row_of(len(TOKENS))
    documents = Documents(documents.cu_seqlens.cuda(), documents.bounds, documents.max_len)
    found = model.logits(model(TOKENS.cuda(), positions.cuda(), documents)).cpu()
    expected = logits(load(folder))
    assert (found - expected).norm() / expected.norm() < 1e-2
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.cpu(), load(folder).model.layers[0].mlp.up_proj.weight)
    assert quantized_bytes(model) > 0
