"""Text from the weights in training, through transformers' own generation on the very same layers.

Consumes no random numbers of the run: samples have a generator of their own. Used by the loop and by
`use.chat`.
"""

from typing import Any

import torch
from torch import nn

from trivium.data.tokenizer import END_OF_TEXT
from trivium.model.qwen import Qwen


class Embedding(nn.Module):
    """The model's token table, in the dtype that its head computes in."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.table = model.model.embed_tokens
        self.dtype = model.head_weight.dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens).to(self.dtype)


class Head(nn.Module):
    """The model's output head; keeps the model out of its own submodules."""

    def __init__(self, model: Qwen) -> None:
        super().__init__()
        self.logits = model.logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden)


def as_transformers(model: Qwen) -> Any:
    """A transformers model made of the given model's own layers, adapted or quantised as they are, without a copy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = model.shape.to_hf_config()
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for path, module in list(twin.named_modules()):
        if any(True for _ in module.parameters(recurse=False)) and path not in ("model.embed_tokens", "lm_head"):
            twin.set_submodule(path, model.get_submodule(path))
    twin.model.embed_tokens, twin.lm_head = Embedding(model), Head(model)
    # The rotary frequencies are no parameters: on the meta device they were never computed.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(model.head_weight.device)
    return twin.eval()


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens at which a text is over: the one that ends a document, then the tokenizer's own end, if it is another.

    A chat tokenizer's end is the end of a turn, which documents never show.
    """
    end_of_document = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    return list(dict.fromkeys([end_of_document, tokenizer.eos_token_id]))


def choice_of_tokens(temperature: float) -> dict[str, Any]:
    """How transformers' generation chooses: from the whole distribution, or at temperature 0 the likeliest."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}


def as_question(prompt: str, tokenizer: Any) -> str:
    """A prompt as the tokenizer's template puts it to a model that answers."""
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
    """What the model writes after a prompt, without the prompt.

    Args:
        model: the weights.
        tokenizer: a transformers tokenizer.
        prompt: the beginning; must hold at least one token.
        stop_ids: the tokens at which it stops.
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the likeliest token each time.
        seed: of the choice of tokens.
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
