"""Which control tokens of a pretrained model were never trained, so that an adapter has to train them.

Control tokens that never occur in training receive the same gradients, so their rows converge to one direction: rows
that are zero or equal another control token's are untrained. A row close to that direction may be untrained (and
rounded) or briefly trained; then a forward pass over the data shows whether the model ends turns.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.data.batch.pack import sequential_batches
from trivium.data.store.build import BuiltStore
from trivium.errors import ConfigError
from trivium.model import adapter, hf
from trivium.model.qwen import Documents
from trivium.model.shape import QwenShape

EQUAL, ALIKE = 0.999, 0.99
"""Cosines between rows. Measured: unused tokens 0.9996 to 1.0; briefly trained ones 0.991 to 0.993."""
MIN_END_PROBABILITY = 0.01
"""Measured: chat models 0.13 to 0.9, base models below 0.0001."""
MAX_TOKENS = 1024


@dataclass(frozen=True)
class PretrainedTokens:
    """A pretrained model and the data used to judge its control tokens.

    Attributes:
        folder: of its weights.
        built: the token stores of the run.
        end_of_turn: token id at the end of each answer; None without conversations.
    """

    folder: Path
    shape: QwenShape
    tokenizer: Any
    built: Sequence[BuiltStore]
    end_of_turn: int | None

    def to_train(self, named: list[str] | None) -> list[int]:
        """Token ids to train: the named ones, or by default the untrained control tokens in the data.

        Raises: ConfigError as `ids_of`.
        """
        if named is None:
            return self.untrained({token for store in self.built for token in store.find_control_tokens(self.control)})
        return self.ids_of(named)

    def ids_of(self, named: list[str]) -> list[int]:
        """The ids of the tokens named in `adapter.train_tokens`.

        Raises: ConfigError when the tokenizer lacks one.
        """
        known = self.tokenizer.get_vocab()
        if unknown := [token for token in named if token not in known]:
            raise ConfigError(
                f"adapter.train_tokens has {unknown[0]!r}, which is not a token of the tokenizer. Write tokens as in "
                "the tokenizer's vocabulary, for example <|im_end|>."
            )
        return [known[token] for token in named]

    @property
    def control(self) -> list[int]:
        """Ids of the control tokens, for example the end of a turn."""
        return sorted(self.tokenizer.get_added_vocab().values())

    def untrained(self, used: Collection[int]) -> list[int]:
        """The control tokens among `used` that were never trained.

        Reads only the rows of reserved tokens, from the embedding and from an untied head; loads the model only if
        these rows are inconclusive.
        """
        reserved = [*self.control, *range(len(self.tokenizer), self.shape.vocab_size)]
        places = [place for place, token in enumerate(self.control) if token in used]
        if not places:
            return []
        files = hf.find_tensors(self.shape, self.folder)
        names = [hf.EMBEDDINGS] if self.shape.tie_word_embeddings else [hf.EMBEDDINGS, hf.HEAD]
        tables = [hf.read_rows(files[name], name, reserved) for name in names]
        likeness = {reserved[place]: max(adapter.likeness(table, place) for table in tables) for place in places}
        alike = [token for token, cosine in likeness.items() if cosine > ALIKE]
        equal = [token for token in alike if likeness[token] > EQUAL]
        return equal if len(equal) < len(alike) and self.end_probability() > MIN_END_PROBABILITY else alike

    @torch.inference_mode()
    def end_probability(self) -> float:
        """Mean probability that the model gives to the end of a turn where answers of the data end; 0 without any."""
        store = next((one for one in self.built if one.has_conversations), None)
        if store is None or self.end_of_turn is None:
            return 0.0
        model = hf.load_model(self.shape, self.folder, torch.bfloat16, "cpu").eval()
        found = []
        for batch in sequential_batches(store.open(), MAX_TOKENS, MAX_TOKENS, MAX_TOKENS):
            documents = Documents(batch.cu_seqlens, batch.bounds, batch.max_document_tokens)
            ends = batch.labels.eq(self.end_of_turn).nonzero()[:, 0]
            hidden_TD = model(batch.tokens, batch.positions, documents)
            found.append(model.token_logprobs(hidden_TD[ends], batch.labels[ends]).exp())
        return float(torch.cat(found).mean()) if sum(map(len, found)) else 0.0
