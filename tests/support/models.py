"""Small real models, adapters and run folders: `make_*` with stock transformers and PEFT, the rest with our model."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trivium.data.tokenizer import load_tokenizer, train_tokenizer
from trivium.model import hf
from trivium.model.qwen import Qwen, init_weights
from trivium.model.shape import QwenShape

END_OF_TEXT, TURN_START, TURN_END = 256, 257, 258

STORIES = [
    "Lily the fox likes to draw. She draws a big red house.",
    "Tom has a small blue boat. The boat is on the lake.",
    "The owl sleeps in the old tree. At night the owl sings.",
]
PAIRS = [
    ("What does Lily draw?", "A house."),
    ("Where is the boat?", "On the lake."),
    ("Who sings?", '{"name": "owl"}'),
]


def small_shape(**changes: Any) -> QwenShape:
    """The sizes of most models in tests; a test that needs others names them."""
    numbers = {
        "family": "qwen3",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
    }
    return QwenShape(**numbers | changes)


def small_model(shape: QwenShape, scale: float = 1.0) -> Qwen:
    """A model with random weights, `scale` times as large as a new model's: larger ones have larger gradients."""
    model = Qwen(shape)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def byte_tokenizer(folder: Path, template: str | None = None) -> Path:
    """259 tokens with plain ChatML, or with a template of one's own."""
    train_tokenizer(["a"], "byte", 259, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def write_base(
    folder: Path,
    tokenizer: Path,
    stops: Sequence[int] = (TURN_END, END_OF_TEXT),
    edit: Callable[[Qwen], object] = lambda model: None,
    scale: float = 1.0,
    **sizes: Any,
) -> Path:
    """A base model as published: no two of its embeddings are equal, unless `edit` makes them so."""
    vocab_size = 64 * -(-len(load_tokenizer(tokenizer)) // 64)
    model = small_model(small_shape(**{"vocab_size": vocab_size} | sizes), scale)
    with torch.no_grad():
        edit(model)
    hf.save_folder(model, folder, tokenizer, torch.float32, {"eos_token_id": list(stops), "pad_token_id": stops[-1]})
    return folder


def zero_rows(*tokens: int) -> Callable[[Qwen], object]:
    """Make these tokens look as in base models that were never trained on them."""

    def edit(model: Qwen) -> None:
        model.model.embed_tokens.weight[list(tokens)] = 0.0

    return edit


def make_base(folder: Path, tie: bool = True, seed: int = 0, family: str = "qwen3") -> Path:
    """A model of two layers with random weights, its tokenizer with a ChatML template, and what ends its text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    train_tokenizer(STORIES, "byte", 259, folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    set_stops(folder, [tokenizer.eos_token_id])
    return folder


def set_stops(folder: Path, stop_ids: list[int]) -> None:
    """Write where generation ends into a folder."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids, "pad_token_id": 256}))


def make_adapter(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """A PEFT adapter with random weights in both matrices, and the tokenizer's files; it ends its turns."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **(defaults | options))
    )
    torch.manual_seed(seed)
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    set_stops(folder, [258, 256])
    return folder


def make_run(folder: Path, run_yaml: str, finished: bool = True) -> Path:
    """What stands around a run's result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(run_yaml)
    if finished:
        (folder / "finished.json").write_text(json.dumps({"step": 10, "num_tokens": 5000, "train_seconds": 12.5}))
    return folder


def teach(base: Path, pairs: list[tuple[str, str]], steps: int = 60) -> None:
    """Train all weights of a folder, in place, to give each answer to its question in ChatML and to stop there."""
    from transformers import AutoModelForCausalLM

    tokenizer, model = load_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    rows = []
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt).input_ids
        ids = start + tokenizer(answer + "<|im_end|>").input_ids
        rows.append((torch.tensor([ids]), torch.tensor([[-100] * len(start) + ids[len(start) :]])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for ids, labels in rows:
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(base)
    set_stops(base, [258, 256])
