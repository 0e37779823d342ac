"""Talk to a finished model: a base model completes text, streamed through transformers' own generation.

Loads the folder as any stranger would, with stock transformers: safetensors only, no code from the folder. Used by
`trivium chat`.
"""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from trivium.engine.sample import choice_of_tokens
from trivium.errors import ConfigError
from trivium.model import hf


class Completer:
    """A Hugging Face folder, ready to complete text.

    Args:
        path: a run folder, or a folder with a model.
        seed: of the choice of tokens.

    Raises: ConfigError when there is no model.
    """

    def __init__(self, path: Path, seed: int | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = path / "model" if (path / "model" / "config.json").is_file() else path
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"{path} holds no model: neither {path / 'model'} nor the folder itself has a config.json. Name the "
                "folder of a finished run, or of a Hugging Face model."
            )
        hf.read_shape(folder)  # refuses what is no Qwen model, and what asks to run code of its own
        safely = {"trust_remote_code": False, "local_files_only": True}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **safely)
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safely)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]} Expected a Hugging Face folder "
                "with its tokenizer and weights in safetensors. Fetch what is missing, or name a finished run."
            ) from error
        self.model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()
        if seed is not None:
            torch.manual_seed(seed)

    def complete(self, prompt: str, max_new_tokens: int, temperature: float) -> Iterator[str]:
        """Pieces of the continuation as they come; leaving early ends the generation."""
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        class Left(StoppingCriteria):
            """Stops when nobody reads any more."""

            is_set = False

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
                return torch.full((len(input_ids),), self.is_set, device=input_ids.device)

        left = Left()
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        arguments = {
            **inputs,
            **choice_of_tokens(temperature),
            "max_new_tokens": max_new_tokens,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([left]),
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        failures: list[Exception] = []

        def generate() -> None:
            try:
                self.model.generate(**arguments)
            except Exception as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.is_set = True
            thread.join()
        if failures:
            raise failures[0]
