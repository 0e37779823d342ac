"""The model card of an adapter as the Hub's library reads it, and the command that serves the adapter."""

import argparse
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from trivium.config.run import Adapter
from trivium.model.card import adapter_card, serve_command, serve_command_of_run

CONFIG = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "r": 16, "use_dora": False}


def served(command: str) -> argparse.Namespace:
    """The options of a command, parsed as a shell and vLLM parse them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--max-lora-rank", type=int)
    parser.add_argument("--lora-modules", nargs="+")
    parser.add_argument("--generation-config")
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("vllm", "serve")
    return parser.parse_args(words)


def test_card_names_its_base_model():
    card = ModelCard(adapter_card(CONFIG))
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert "lora" in card.data.tags and "rank 16" in card.text
    command = next(line for line in card.text.splitlines() if line.startswith("vllm"))
    assert served(command).model == "Qwen/Qwen3-0.6B" and served(command).generation_config == "."


@pytest.mark.parametrize("base", ["/home/me/runs/quickstart/model", "runs/full", "models/a: b\n---", ""])
def test_card_does_not_tell_where_a_local_base_model_is(base: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "full").mkdir(parents=True)
    text = adapter_card(CONFIG | {"base_model_name_or_path": base})
    assert ModelCard(text).data.base_model is None and "Hub id" in text
    assert not base or base not in text


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"trainable_token_indices": [7]}, {"r": 1024}])
def test_card_has_no_command_for_what_vllm_refuses(changes: dict[str, object]):
    assert "vllm serve" not in adapter_card(CONFIG | changes) and "merged model" in adapter_card(CONFIG | changes)


def test_serve_command_names_the_adapters_generation_config():
    found = served(serve_command("Qwen/Qwen3-0.6B", "runs/my tales/adapter", "my tales", 24) or "")
    assert found.enable_lora and found.max_lora_rank == 32
    assert found.lora_modules == ["my tales=runs/my tales/adapter"]
    assert found.generation_config == "runs/my tales/adapter"


def test_serve_command_of_run_allows_for_the_rank_that_is_written():
    folder = Path("runs/tuned/adapter")
    for adapter, rank in ((Adapter(rank=16), 16), (Adapter(rank=16, init="pissa"), 32)):
        assert served(serve_command_of_run("base", folder, adapter, has_rows=False) or "").max_lora_rank == rank
    assert serve_command_of_run("base", folder, Adapter(dora=True), has_rows=False) is None
    assert serve_command_of_run("base", folder, Adapter(), has_rows=True) is None
