"""Adapters compared with PEFT: saved here and loaded there, saved there and loaded here, merged by both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trivium.config.run import Adapter
from trivium.errors import ConfigError
from trivium.model import adapter, hf
from trivium.model.quantize import load_quantized
from trivium.model.qwen import Documents, Qwen, init_weights
from trivium.model.shape import QwenShape
from trivium.model.tokens import TrainableTokens

SHAPES = {
    "qwen2-tied": QwenShape("qwen2", 211, 64, 176, 2, 4, 2, 16, True),
    "qwen2-untied": QwenShape("qwen2", 211, 48, 96, 2, 3, 3, 16, False),
    "qwen3-tied": QwenShape("qwen3", 211, 32, 96, 2, 4, 2, 32, True),
    "llama-tied": QwenShape("llama", 211, 48, 96, 2, 3, 1, 16, True, rope_theta=1e5, rms_norm_eps=1e-5),
    "qwen3-untied": QwenShape("qwen3", 211, 64, 128, 2, 4, 1, 16, False),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 6.0},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa", "alpha": 3.0},
    "pissa-dora-rslora": {"init": "pissa", "dora": True, "rslora": True},
    "some-targets": {"targets": ["v_proj", "down_proj"]},
}
TOKEN_IDS = [150, 7]
TOKENS = torch.randint(211, (40,), generator=torch.Generator().manual_seed(0))
TOKENS[::5] = 7
GENERATION = {"eos_token_id": [7, 3], "pad_token_id": 3}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each shape, with weights at which nothing hides."""
    folders = {}
    for name, shape in SHAPES.items():
        model = Qwen(shape)
        init_weights(model, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5, generator=generator)
                else:
                    parameter.normal_(0.0, 0.15, generator=generator)
        folders[name] = tmp_path_factory.mktemp(name) / "base"
        hf.save_folder(model, folders[name], None, torch.float32, GENERATION)
    return folders


@pytest.fixture(params=SHAPES)
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen:
    model = Qwen(hf.read_shape(folder)).to(dtype)
    hf.load_weights(model, folder)
    model.compute_dtype = dtype
    return model


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hidden_states(model: Qwen, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    length = len(tokens)
    documents = Documents(torch.tensor([0, length], dtype=torch.int32), (0, length), length)
    return model(tokens, torch.arange(length), documents)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.logits(hidden_states(model)) if isinstance(model, Qwen) else model.eval()(TOKENS[None]).logits[0]


def train(model: Qwen, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        F.cross_entropy(model.logits(hidden_states(model)).float(), TOKENS.roll(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_loads_in_peft_and_merges_to_the_same(base: Path, kind: str, tmp_path: Path) -> None:
    model = load_base(base)
    before = logits(model)
    adapter.inject(model, Adapter(rank=4, **KINDS[kind]), seed=1, token_ids=TOKEN_IDS)
    train(model)
    adapter.save(model, tmp_path / "adapter", "owner/base", None, GENERATION)
    ours = logits(model)

    theirs = PeftModel.from_pretrained(stock(base), tmp_path / "adapter")
    close(ours, logits(theirs))
    close(ours, logits(adapter.merge(model)), atol=1e-4)
    close(ours, logits(theirs.merge_and_unload()), atol=1e-4)
    again = load_base(base)
    adapter.load(again, tmp_path / "adapter")
    close(ours, logits(again))
    assert (ours - before).abs().max() > 0.3


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "some-targets"])
@pytest.mark.parametrize("with_rows", [False, True])
def test_load_reads_adapters_saved_by_peft(base: Path, kind: str, with_rows: bool, tmp_path: Path) -> None:
    tied = hf.read_shape(base).tie_word_embeddings
    rows: Any = TOKEN_IDS if tied else {"embed_tokens": TOKEN_IDS, "lm_head": TOKEN_IDS}
    torch.manual_seed(0)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=KINDS[kind].get("targets", "all-linear"),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        trainable_token_indices=rows if with_rows else None,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(stock(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load_base(base)
    adapter.load(ours, tmp_path)
    assert (logits(theirs) - logits(load_base(base))).abs().max() > 0.1
    close(logits(ours), logits(theirs))
    close(logits(adapter.merge(ours)), logits(theirs.merge_and_unload()), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_injected_adapter_starts_as_the_base_model(base: Path, kind: str) -> None:
    model = load_base(base)
    before = logits(model)
    adapter.inject(model, Adapter(rank=4, **KINDS[kind]), seed=1)
    if "pissa" in kind:
        close(logits(model), before)
    else:
        assert torch.equal(logits(model), before)


def test_trainable_tokens_start_unchanged(base: Path) -> None:
    model = load_base(base)
    before, hidden = logits(model), hidden_states(model)
    adapter.inject(model, Adapter(rank=4), seed=1, token_ids=TOKEN_IDS)
    assert torch.equal(hidden_states(model), hidden)
    close(logits(model), before, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_training_keeps_the_base_unchanged(base: Path, kind: str, dtype: torch.dtype) -> None:
    model, plain = load_base(base, dtype), load_base(base, dtype)
    adapter.inject(model, Adapter(rank=4, **KINDS[kind]), seed=1, token_ids=TOKEN_IDS)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32 and not torch.equal(parameter, first[name]), name
        else:
            original = plain.get_parameter(name.replace(".base_layer", ""))
            assert parameter.dtype == dtype and torch.equal(parameter, original), name
    num_rows = 1 if model.shape.tie_word_embeddings else 2
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == model.shape.num_hidden_layers * 7 * (3 if kind == "dora" else 2) + num_rows


def test_adapter_init_depends_only_on_seed_and_name(base: Path) -> None:
    def first(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        model = load_base(base)
        adapter.inject(model, Adapter(rank=4, **settings), seed)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    one = first(7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, fewer, other = first(7), first(7, targets=["up_proj"]), first(8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert fewer and all(torch.equal(one[name], value) for name, value in fewer.items())
    for name, value in one.items():
        assert torch.equal(value, other[name]) == ("lora_B" in name) == (value == 0).all().item()
        if "lora_A" in name:  # uniform within 1 / sqrt(in), as PEFT draws it
            bound = value.shape[1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.2 * bound
    principal = [first(7, init="pissa") for _ in range(2)]
    assert all(torch.equal(value, principal[1][name]) for name, value in principal[0].items())


def test_pissa_equals_pissa_of_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(bases["qwen3-untied"])
    with torch.no_grad():  # singular values that fall, as those of a trained model do
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                left, values, right = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(left @ torch.diag(values * 0.5 ** torch.arange(len(values))) @ right)
    hf.save_folder(model, tmp_path, None, torch.float32)
    adapter.inject(model, Adapter(rank=4, init="pissa"), seed=0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    theirs = get_peft_model(stock(tmp_path), config).get_base_model()
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        close(model.get_submodule(path).base_layer.weight, theirs.get_submodule(path).base_layer.weight, atol=1e-4)
        close(*(layer.get_submodule(path).get_delta_weight("default") for layer in (model, theirs)), atol=1e-4)


def test_pissa_on_a_sixteen_bit_base_adds_up_to_it(bases: dict[str, Path]) -> None:
    model, plain = load_base(bases["qwen3-tied"], torch.bfloat16), load_base(bases["qwen3-tied"], torch.bfloat16)
    adapter.inject(model, Adapter(rank=4, init="pissa"), seed=0)
    for name, merged in adapter.merge(model).named_parameters():
        original = plain.get_parameter(name).float()
        assert (merged - original).norm() <= 2**-8 * original.norm(), name


def test_adapter_dropout_applies_only_in_training(base: Path) -> None:
    model = load_base(base)
    adapter.inject(model, Adapter(rank=4, dropout=0.5), seed=1, token_ids=TOKEN_IDS)
    train(model)
    torch.manual_seed(0)
    one, two = logits(model.train()), logits(model)
    assert (one - two).abs().max() > 1e-3
    torch.manual_seed(0)
    assert torch.equal(one, logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    close(logits(model), logits(adapter.merge(model)), atol=1e-4)


def test_adapter_in_bf16_computes_in_bf16_close_to_fp32(base: Path) -> None:
    model, sixteen = load_base(base), load_base(base, torch.bfloat16)
    for one in (model, sixteen):
        adapter.inject(one, Adapter(rank=4), seed=1, token_ids=TOKEN_IDS)
    dtypes = set()
    for _, module in sixteen.named_modules():
        module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    train(model)
    for name, parameter in sixteen.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(model.get_parameter(name))
    difference = (logits(sixteen).float() - logits(model)).norm() / logits(model).norm()
    assert dtypes == {torch.bfloat16} and difference < 0.03


def test_only_trainable_tokens_change(base: Path) -> None:
    model = load_base(base)
    adapter.inject(model, Adapter(rank=4), seed=1, token_ids=TOKEN_IDS)
    table = model.model.embed_tokens
    assert isinstance(table, TrainableTokens)
    train(model)
    folded, original = table.folded(), load_base(base).model.embed_tokens.weight
    changed = (folded != original).any(1).nonzero().flatten().tolist()
    assert changed == sorted(TOKEN_IDS)
    assert torch.equal(table(torch.arange(211)), folded)
    head = load_base(base).head_weight.index_copy(0, *model.head_rows)
    close(logits(model), (hidden_states(model) @ head.T).detach())


def test_nf4_base_and_peft_exchange_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = bases["qwen3-untied"]
    with torch.device("meta"):
        model = Qwen(hf.read_shape(folder))
    load_quantized(model, folder, torch.float32, "cpu")
    plain = adapter.merge(model)
    hf.save_folder(plain, tmp_path / "plain", None, torch.float32)
    before = logits(model)
    adapter.inject(model, Adapter(rank=4), seed=1, token_ids=TOKEN_IDS)
    close(logits(model), before, atol=1e-6)
    train(model)
    adapter.save(model, tmp_path / "adapter", str(folder), None, GENERATION)
    close(logits(model), logits(PeftModel.from_pretrained(stock(tmp_path / "plain"), tmp_path / "adapter")))
    close(logits(model), logits(adapter.merge(model)), atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_loftq_reduces_quantization_error_and_saves_the_change(
    bases: dict[str, Path], dora: bool, tmp_path: Path
) -> None:
    folder = bases["qwen3-untied"]

    def quantized(init: str) -> Qwen:
        with torch.device("meta"):
            model = Qwen(hf.read_shape(folder))
        load_quantized(model, folder, torch.float32, "cpu")
        adapter.inject(model, Adapter(rank=12, alpha=30.0, init=init, dora=dora), 1, weights_folder=folder)
        return model

    original = load_base(folder)
    lost = (logits(quantized("default")) - logits(original)).norm()
    model = quantized("loftq")
    assert (logits(model) - logits(original)).norm() < 0.8 * lost
    # Saved before training, it does not change the unquantized model.
    adapter.save(model, tmp_path / "nothing", str(folder), None, GENERATION)
    loaded = logits(PeftModel.from_pretrained(stock(folder), tmp_path / "nothing"))
    if dora:  # whose magnitudes are those of the weights with the error mostly made up for
        assert (loaded - logits(original)).norm() < 0.2 * lost
    else:
        close(loaded, logits(original))
    train(model)
    adapter.save(model, tmp_path / "trained", str(folder), None, GENERATION)
    loaded = logits(PeftModel.from_pretrained(stock(folder), tmp_path / "trained"))
    assert (loaded - logits(model)).norm() < 0.8 * lost


def test_adapter_folder_is_a_stock_peft_folder(base: Path, tmp_path: Path) -> None:
    model = load_base(base)
    adapter.inject(model, Adapter(rank=4, init="pissa", rslora=True), seed=1, token_ids=TOKEN_IDS)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "run_me.py").write_text("raise SystemExit('never copied')")
    for _ in range(2):  # the second makes way for the first
        adapter.save(model, tmp_path / "adapter", "owner/base", tokenizer, GENERATION)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {*weights, "generation_config.json", "tokenizer.json", "README.md"}
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == "owner/base"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "tokenizer"}
    assert json.loads((tmp_path / "adapter" / "generation_config.json").read_text()) == GENERATION
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {"base_model_name_or_path": "owner/base", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    expected |= {"r": 8, "lora_alpha": 32, "use_rslora": False, "init_lora_weights": True, "modules_to_save": None}
    assert {key: content[key] for key in expected} == expected
    assert content["lora_alpha"] / content["r"] == Adapter(rank=4, init="pissa", rslora=True).scaling
    assert content["target_modules"] == sorted(content["target_modules"]) and len(content["target_modules"]) == 7
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_save_adapter_does_not_overwrite_other_files(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    model = load_base(base)
    adapter.inject(model, Adapter(rank=4), seed=1)
    with pytest.raises(ConfigError, match="not touched"):
        adapter.save(model, tmp_path, "owner/base", None, GENERATION)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"something_new": {"x": 1}}, "something_new"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "trainable_token_indices"),
        ({"r": None}, "not a complete LoRA"),
        ({"r": 0}, "not a complete LoRA"),
        ({"lora_alpha": "much"}, "not a complete LoRA"),
        ({"r": 5}, "do not fit its adapter_config.json"),
        ({"target_modules": ["q_proj"]}, "not part of the model"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, "not part of the model"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"trainable_token_indices": [1]}, "trainable_token"),
    ],
)
def test_unsupported_adapters_are_refused(
    bases: dict[str, Path], change: dict[str, object], words: str, tmp_path: Path
) -> None:
    model = load_base(bases["qwen2-untied"])
    adapter.inject(model, Adapter(rank=4), seed=1)
    adapter.save(model, tmp_path, "owner/base", None, GENERATION)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words) as raised:
        adapter.load(load_base(bases["qwen2-untied"]), tmp_path)
    assert "\n" not in str(raised.value)


def test_pickled_and_damaged_adapters_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(bases["qwen2-tied"])
    adapter.inject(model, Adapter(rank=4), seed=1)
    adapter.save(model, tmp_path, "owner/base", None, GENERATION)
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        adapter.load(load_base(bases["qwen2-tied"]), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="safetensors only"):
        adapter.load(load_base(bases["qwen2-tied"]), tmp_path)
    weights.write_bytes(content)
    save_file({name + "x": tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match="is missing"):
        adapter.load(load_base(bases["qwen2-tied"]), tmp_path)


def test_adapters_that_are_not_finite_are_refused(base: Path, tmp_path: Path) -> None:
    model = load_base(base)
    adapter.inject(model, Adapter(rank=4), seed=1)
    adapter.save(model, tmp_path, str(base), None, GENERATION)
    tensors = load_file(tmp_path / adapter.WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name][2, 0] = float("inf")
    save_file(tensors, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ConfigError, match=f"an infinity in {name}, first in row 2;"):
        adapter.load(load_base(base), tmp_path)


def test_impossible_adapter_inits_are_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="at most 16"):
        adapter.inject(load_base(bases["qwen3-untied"]), Adapter(rank=17, init="pissa"), seed=0)
    with torch.device("meta"):
        model = Qwen(hf.read_shape(bases["qwen3-untied"]))
    load_quantized(model, bases["qwen3-untied"], torch.float32, "cpu")
    with pytest.raises(ConfigError, match="loftq"):
        adapter.inject(model, Adapter(rank=4, init="pissa"), seed=0)


def test_likeness_is_the_largest_cosine_to_another_row() -> None:
    torch.manual_seed(0)
    table = torch.randn(12, 8)
    table[3] = 0.0
    table[6] = 0.01 * table[10]
    assert adapter.likeness(table, 3) == 1.0
    assert adapter.likeness(table, 10) == pytest.approx(1.0)
    assert adapter.likeness(table.bfloat16(), 6) == pytest.approx(1.0, abs=1e-4)
    others = [row for row in range(12) if row not in (3, 5)]
    expected = torch.nn.functional.cosine_similarity(table[5][None], table[others], dim=1).max()
    assert adapter.likeness(table, 5) == pytest.approx(float(expected))


def test_inject_keeps_trained_weights_in_fp32_on_a_bf16_base(base: Path) -> None:
    model = load_base(base, torch.bfloat16)
    adapter.inject(model, Adapter(rank=4), seed=1, token_ids=TOKEN_IDS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}
