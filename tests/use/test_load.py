"""What a user names is found and loaded whole, or refused with what to do; nothing missing is made up."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.models import make_adapter, make_base, make_run, set_stops
from trivium.errors import ConfigError
from trivium.use.load import find, load

IDS = torch.tensor([[76, 105, 108, 121, 32, 100]])


def test_find_models_adapters_and_runs(tmp_path: Path, base: Path, adapter: Path):
    assert find(str(base)).kind == "base"
    found = find(str(adapter))
    assert (found.kind, found.base_folder, found.run_folder) == ("adapter", base, None)
    run = make_run(tmp_path / "tuned", "weights: nf4\n")
    shutil.copytree(adapter, run / "adapter")
    for name in (run, run / "adapter"):
        place = find(str(name))
        assert (place.kind, place.folder, place.was_quantized) == ("adapter", run / "adapter", True)
        assert place.run_folder is not None and place.run_folder.samefile(run)
    scratch = make_run(tmp_path / "scratch", "weights: random\n")
    shutil.copytree(base, scratch / "model")
    place = find(str(scratch))
    assert (place.kind, place.folder, place.was_quantized) == ("model", scratch / "model", False)


def test_load_adapter_equals_peft(adapter: Path, base: Path):
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    loaded = load(str(adapter))
    with torch.no_grad():
        assert torch.equal(loaded.network(IDS.to(loaded.network.device)).logits.cpu(), stock(IDS).logits)
    assert loaded.stop_ids == [258, 256] and loaded.converses
    plain = load(str(base))
    assert plain.stop_ids == [256] and plain.template is not None and not plain.converses


def test_load_without_a_usable_template_completes_texts(tmp_path: Path):
    for number, template in enumerate((None, "{{ raise_exception('never') }}")):
        folder = make_base(tmp_path / f"base-{number}")
        set_stops(folder, [258, 256])
        assert load(str(folder)).converses
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        loaded = load(str(folder))
        assert loaded.template is None and not loaded.converses


def test_load_quantized_adapter_on_both_base_models(tmp_path: Path, adapter: Path):
    run = make_run(tmp_path / "qlora", "weights: nf4\n")
    shutil.copytree(adapter, run / "adapter")
    said: list[str] = []
    whole = load(str(run), said.append)
    assert len(said) == 1 and "NF4" in said[0]
    quantized = load(str(run), said.append, nf4=True)
    assert len(said) == 1
    assert type(quantized.network.model.layers[0].mlp.gate_proj).__name__ == "NF4Linear"
    with torch.no_grad():
        distance = (whole.network(IDS).logits - quantized.network(IDS).logits).abs().max()
    assert 1e-4 < distance < 5


def test_load_uses_the_tokenizer_of_the_base_model(tmp_path: Path, adapter: Path):
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    assert len(load(str(bare)).tokenizer) == 259


def break_nothing_there(folder: Path) -> Path:
    return folder / "empty"


def break_unfinished(folder: Path) -> Path:
    return make_run(folder / "unfinished", "weights: random\n", finished=False)


def break_unfinished_with_model(folder: Path) -> Path:
    run = make_run(folder / "nearly", "weights: random\n", finished=False)
    make_base(run / "model")
    return run


def break_base_moved(folder: Path) -> Path:
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"))
    (folder / "base").rename(folder / "elsewhere")
    return adapter


def break_no_base_named(folder: Path) -> Path:
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    return adapter


def break_no_tokenizer(folder: Path) -> Path:
    base = make_base(folder / "base")
    (base / "tokenizer.json").unlink()
    return base


def break_pickled_adapter(folder: Path) -> Path:
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    return adapter


def break_weight_missing(folder: Path) -> Path:
    base = make_base(folder / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def break_adapter_weight_missing(folder: Path) -> Path:
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"))
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return adapter


def break_other_base(folder: Path) -> Path:
    adapter = make_adapter(folder / "adapter", make_base(folder / "base"))
    config = json.loads((folder / "base" / "config.json").read_text()) | {"intermediate_size": 96}
    from transformers import Qwen3Config, Qwen3ForCausalLM

    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(folder / "base")
    return adapter


def break_other_tokenizer(folder: Path) -> Path:
    from trivium.data.tokenizer import train_tokenizer

    base = make_base(folder / "base")
    train_tokenizer(["".join(chr(0x400 + n) for n in range(99)) * 2], "char", 358, base)
    return base


def break_own_code(folder: Path) -> Path:
    base = make_base(folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    return base


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (break_nothing_there, "is not a model: there is no such folder"),
        (lambda folder: folder, "neither config.json nor adapter_config.json"),
        (break_unfinished, "is not finished"),
        (break_unfinished_with_model, "is not finished"),
        (break_base_moved, "correct base_model_name_or_path in"),
        (break_no_base_named, "does not name the adapter"),
        (break_no_tokenizer, "No tokenizer.json in"),
        (break_pickled_adapter, "has no adapter_model.safetensors"),
        (break_weight_missing, "model.layers.1.mlp.up_proj.weight"),
        (break_adapter_weight_missing, "lacks weights"),
        (break_other_base, "does not fit its base"),
        (break_other_tokenizer, "358 tokens"),
        (break_own_code, "auto_map"),
    ],
)
def test_load_refusals(make, words: str, tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        load(str(make(tmp_path)))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
