"""Text from the weights in training, through transformers' own generation on the very same tensors.

Consumes no random numbers of the run: samples have a generator of their own. Used by the loop and by
`use.chat`.
"""

from typing import Any

import torch

from trivium.data.tokenizer import document_encoding
from trivium.model.qwen import Qwen


def as_transformers(model: Qwen) -> Any:
    """A transformers model whose parameters are the given model's tensors; nothing is copied."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, Any] = model.shape.to_hf_config()
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    twin.load_state_dict(dict(model.named_parameters()), assign=True, strict=False)
    twin.tie_weights()
    # The rotary frequencies are no parameters: on the meta device they were never computed.
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config).to(next(model.parameters()).device)
    return twin.eval()


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens at which a text is over: the one that ends a document, then the tokenizer's own end, if it is another.

    A chat tokenizer's end is the end of a turn, which documents never show.
    """
    return list(dict.fromkeys([document_encoding(tokenizer).end_id, tokenizer.eos_token_id]))


def choice_of_tokens(temperature: float) -> dict[str, Any]:
    """How transformers' generation chooses: from the whole distribution, or at temperature 0 the likeliest."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}


def complete(model: Qwen, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """What the model writes after a prompt, without the prompt; ends at the end-of-text token.

    Args:
        model: the weights, fp32.
        tokenizer: a transformers tokenizer.
        prompt: the beginning; must hold at least one token.
        max_new_tokens: where to stop at the latest.
        temperature: 0 takes the likeliest token each time.
        seed: of the choice of tokens.
    """
    twin = as_transformers(model)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = twin.generate(
            **inputs,
            **choice_of_tokens(temperature),
            max_new_tokens=max_new_tokens,
            eos_token_id=end_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
