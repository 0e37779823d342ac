"""How an adapter is served, and its model card: README.md with the tags that the Hub reads. Never imports torch."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trivium.config.run import Adapter

CARD = "README.md"
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank. Source: vllm.config.lora."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def serve_command(base: str, folder: str, name: str, rank: int) -> str | None:
    """vLLM's command for an adapter and its base model; None if its rank is too large for vLLM.

    vLLM takes the tokens that end an answer from the base model unless it is told where the adapter's are, and a base
    model does not stop at the end of a turn. Measured with vLLM 0.32: no answer ended without --generation-config.
    """
    served = next((most for most in SERVED_RANKS if most >= rank), None)
    if served is None:
        return None
    modules = f"{name}={folder}"
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(served)]
    return shlex.join([*words, "--lora-modules", modules, "--generation-config", folder])


def serve_command_of_run(base: str, folder: Path, adapter: Adapter, has_rows: bool) -> str | None:
    """`serve_command` for the adapter that a run writes; None if vLLM accepts only the merged model."""
    if adapter.dora or has_rows:
        return None
    rank = adapter.rank if adapter.init == "default" else 2 * adapter.rank  # see `adapter.save`
    return serve_command(base, str(folder), folder.parent.name, rank)


def adapter_card(config: Mapping[str, Any]) -> str:
    """The model card of an adapter, from its adapter_config.json.

    A base model that is a folder is not named: the Hub has no local folders, and paths are private.
    """
    base = str(config.get("base_model_name_or_path") or "")
    is_hub_id = HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    tags: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if is_hub_id else {}
    tags |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "trivium"]}
    of_base = f"[{base}](https://huggingface.co/{base})" if is_hub_id else "a local model"
    missing = "" if is_hub_id else "Before you publish it, add the base model's Hub id as `base_model` above.\n\n"
    is_low_rank = not config.get("use_dora") and not config.get("trainable_token_indices")
    command = serve_command(base if is_hub_id else "BASE_MODEL", ".", "adapter", int(config["r"]))
    serving = "Servers that accept only low-rank matrices, for example vLLM, need the merged model.\n"
    if is_low_rank and command:
        serving = (
            "vLLM, from this folder. Without `--generation-config` the base model's stop tokens count, and answers "
            f"may never end.\n\n```\n{command}\n```\n"
        )
    return (
        f"---\n{yaml.safe_dump(tags, sort_keys=False)}---\n\n# {kind} adapter\n\n"
        f"A {kind} adapter of rank {config['r']} for {of_base}, trained with Trivium.\n\n{missing}"
        "## Use\n\n```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER_OR_HUB_ID")\n```\n\n'
        f"{serving}"
    )
