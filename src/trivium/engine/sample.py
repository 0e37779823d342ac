"""Generate text during training with transformers' `generate`, on the training model's own layers.

Sampling does not advance the run's random state.
"""

from typing import Any

import torch
from torch import nn

from trivium.data.tokenizer import END_OF_TEXT
from trivium.model.qwen import Qwen


class TwinEmbedding(nn.Module):
    """The embedding table, cast to the dtype of the head."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.table = model.model.embed_tokens
        self.dtype = model.head_weight.dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).to(self.dtype)


class TwinHead(nn.Module):
    """The output head. Holds a bound method, since the model itself must not become a submodule."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.logits = model.logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden)


def as_transformers(model: Qwen) -> Any:
    """A transformers model that shares the layers of `model`, including adapters and quantization, without a copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = model.shape.to_hf_config()
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for path, module in list(twin.named_modules()):
        if any(True for _ in module.parameters(recurse=False)) and path not in ("model.embed_tokens", "lm_head"):
            twin.set_submodule(path, model.get_submodule(path))
    twin.model.embed_tokens, twin.lm_head = TwinEmbedding(model), TwinHead(model)
    # The rotary frequencies are a buffer, which the meta device did not compute.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.head_weight.device)
    return twin.eval()


def end_ids(tokenizer: Any) -> list[int]:
    """Ids that end a text: end of document, then the tokenizer's EOS if it differs (in chat models, end of turn)."""
    end_of_document = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    return list(dict.fromkeys([end_of_document, tokenizer.eos_token_id]))


def choice_of_tokens(temperature: float) -> dict[str, Any]:
    """Arguments of `generate`: sample from the full distribution, or decode greedily at temperature 0."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}


def as_question(prompt: str, tokenizer: Any) -> str:
    """The prompt as a user message in the tokenizer's chat template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def complete(
    model: Qwen,
    tokenizer: Any,
    prompt: str,
    stop_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> str:
    """Generate a continuation of `prompt` (at least one token) up to a token of `stop_ids`; the prompt is not returned.

    Temperature 0 decodes greedily. `seed` is the seed of the sampling.
    """
    twin = as_transformers(model)
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.head_weight.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = twin.generate(
            **inputs,
            **choice_of_tokens(temperature),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
