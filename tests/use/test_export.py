"""Exports compute what they should by the word of stock PEFT and transformers, or they are not there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import make_adapter, make_base, make_run
from trivium.errors import ConfigError, TriviumError
from trivium.files import sha256_file
from trivium.use.export import export, require_config

IDS = torch.tensor([[76, 105, 108, 121, 32, 100, 258, 256]])


def silent(text: str) -> None:
    pass


@pytest.mark.parametrize(("family", "tie"), [("qwen3", True), ("qwen3", False), ("llama", True)])
def test_merged_export_equals_the_merge_of_peft(family: str, tie: bool, tmp_path: Path):
    base = make_base(tmp_path / "base", tie=tie, family=family)
    rows = [256, 258] if tie else {"embed_tokens": [256, 258], "lm_head": [256, 258]}
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=rows)
    done = export(str(adapter), tmp_path / "out" / "merged", merge=True, dtype=None, note=silent)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    with torch.no_grad():
        assert (merged(IDS).logits - adapted(IDS).logits).abs().max() < 1e-4
        untouched = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        assert (merged(IDS).logits - untouched).abs().max() > 0.01
    oracle = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, oracle[name]), name
    assert done.max_difference <= 1e-4 and done.rounding is None and done.prompts_from == "built-in prompts"
    assert merged.generation_config.eos_token_id == [258, 256]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    assert (merged.config.model_type, merged.config.tie_word_embeddings) == (family, tie)
    assert str(tmp_path) not in (tmp_path / "out" / "merged" / "config.json").read_text()


def test_bfloat16_export_rounds_the_merge_and_reports_it(tmp_path: Path, adapter: Path):
    fp32 = export(str(adapter), tmp_path / "fp32", merge=True, dtype=None, note=silent)
    done = export(str(adapter), tmp_path / "bf16", merge=True, dtype=torch.bfloat16, note=silent)
    whole, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, whole[name].bfloat16()), name
    assert done.max_difference <= 1e-4 and done.rounding is not None and done.rounding > 1e-3
    assert (fp32.dtype, done.dtype) == ("float32", "bfloat16")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bfloat16_base_is_summed_in_fp32_and_stays_bfloat16(tmp_path: Path, base: Path):
    lean = make_base(tmp_path / "lean")
    AutoModelForCausalLM.from_pretrained(lean).bfloat16().save_pretrained(lean)
    adapter = make_adapter(tmp_path / "adapter", lean)
    done = export(str(adapter), tmp_path / "merged", merge=True, dtype=None, note=silent)
    assert done.dtype == "bfloat16"
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lean, dtype=torch.float32), str(adapter))
    oracle = stock.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, oracle[name].bfloat16()), name


def test_export_with_different_logits_leaves_nothing(tmp_path: Path):
    base = make_base(tmp_path / "base", tie=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(TriviumError, match="logits of .* differ"):
        export(str(adapter), tmp_path / "out" / "merged", merge=True, dtype=None, note=silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_export_of_a_quantized_run_reports_the_difference(tmp_path: Path, base: Path):
    run = make_run(tmp_path / "qlora", "weights: nf4\nsample: {prompts: [Lily, The owl]}\n")
    make_adapter(run / "adapter", base)
    said: list[str] = []
    done = export(str(run), tmp_path / "merged", merge=True, dtype=None, note=said.append)
    assert any("NF4" in line for line in said)
    assert (done.prompts_from, done.num_prompts) == ("sample prompts", 2)
    assert done.quantized_difference is not None and done.quantized_difference > 1e-4 > done.max_difference
    assert done.quantized_loss is not None and done.loss is not None
    assert 0 < abs(done.quantized_loss - done.loss) < 0.5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [[{"role": "user", "content": prompt}] for prompt in ("Lily", "The owl")]
    losses = []
    for each in turns:
        ids = tokenizer(
            tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True), return_tensors="pt"
        ).input_ids
        losses.append((float(merged(input_ids=ids, labels=ids).loss), ids.shape[1] - 1))
    assert done.loss == pytest.approx(sum(a * n for a, n in losses) / sum(n for _, n in losses), abs=1e-5)


def test_copied_adapter_has_the_same_bytes(tmp_path: Path, adapter: Path):
    done = export(str(adapter), tmp_path / "copy", merge=False, dtype=None, note=silent)
    assert done.max_difference == 0.0
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"}
    assert "README.md" in names
    for name in names - {"adapter_model.safetensors"}:
        assert sha256_file(tmp_path / "copy" / name) == sha256_file(adapter / name)
    assert_same_tensors(tmp_path / "copy" / "adapter_model.safetensors", adapter / "adapter_model.safetensors")


def assert_same_tensors(left: Path, right: Path) -> None:
    one, other = load_file(left), load_file(right)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copied_model_has_the_same_weights(dtype: torch.dtype, tmp_path: Path):
    base = make_base(tmp_path / "base", tie=False)
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base)
    done = export(str(base), tmp_path / "copy", merge=False, dtype=None, note=silent)
    assert done.max_difference == 0.0
    assert_same_tensors(tmp_path / "copy" / "model.safetensors", base / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert sha256_file(tmp_path / "copy" / name) == sha256_file(base / name)


@pytest.mark.parametrize(("family", "tie"), [("qwen2", False), ("qwen3", True)])
@pytest.mark.parametrize("kind", ["plain", "merged", "adapter"])
def test_exports_are_readable_by_others(kind: str, family: str, tie: bool, tmp_path: Path):
    """Readers before transformers 5 use only top-level keys, and servers run as other users."""
    base = make_base(tmp_path / "base", tie=tie, family=family)
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    source = base if kind == "plain" else make_adapter(tmp_path / "adapter", base)
    before = os.umask(0o027)
    try:
        export(str(source), tmp_path / "out", merge=kind == "merged", dtype=None, note=silent)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)
    if kind != "adapter":
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        wanted = {"rope_theta": 1e6, "head_dim": 16, "tie_word_embeddings": tie, "vocab_size": 320}
        wanted |= {"dtype": "float32", "torch_dtype": "float32", "eos_token_id": 256 if kind == "plain" else 258}
        assert {key: found.get(key) for key in wanted} == wanted
        assert found["pad_token_id"] == 256


def test_a_config_that_others_would_misread_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"rope_parameters": {"rope_theta": 1e6}, "vocab_size": 320}')
    with pytest.raises(TriviumError, match=r"rope_theta None instead of 1000000\.0, so other programs"):
        require_config(tmp_path, {"rope_theta": 1e6, "vocab_size": 320})
    require_config(tmp_path, {"vocab_size": 320})


def test_files_that_are_not_exported_are_named(tmp_path: Path):
    base = make_base(tmp_path / "base")
    for name in ("LICENSE", ".gitattributes", "pytorch_model.bin"):
        (base / name).write_text("x")
    said: list[str] = []
    export(str(base), tmp_path / "copy", merge=False, dtype=None, note=said.append)
    assert [line for line in said if line.startswith(f"not exported from {base}: LICENSE, pytorch_model.bin; ")]
    assert not (tmp_path / "copy" / "LICENSE").exists()


def test_copied_adapter_of_others_gets_a_model_card(tmp_path: Path, adapter: Path):
    plain = shutil.copytree(adapter, tmp_path / "plain", ignore=shutil.ignore_patterns("README.md"))
    export(str(plain), tmp_path / "copy", merge=False, dtype=None, note=silent)
    assert "LoRA adapter" in (tmp_path / "copy" / "README.md").read_text()
    (plain / "README.md").write_text("my own words")
    said: list[str] = []
    export(str(plain), tmp_path / "again", merge=False, dtype=None, note=said.append)
    assert (tmp_path / "again" / "README.md").read_text() == "my own words" and not any("README" in one for one in said)


def test_export_never_touches_existing_files(tmp_path: Path, adapter: Path, base: Path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    for out in (taken, taken / "config.json"):
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            export(str(adapter), out, merge=True, dtype=None, note=silent)
    assert [(file.name, file.read_text()) for file in taken.iterdir()] == [("config.json", "{}")]
    with pytest.raises(ConfigError, match="nothing to merge"):
        export(str(base), tmp_path / "out", merge=True, dtype=None, note=silent)
    with pytest.raises(ConfigError, match="Add --merge"):
        export(str(adapter), tmp_path / "out", merge=False, dtype=torch.bfloat16, note=silent)
    assert not (tmp_path / "out").exists()
