"""Chat templates: render conversations exactly as serving does, and check that a template is usable for training.

The tokenizer's own template is always used; there is no code for particular models.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.data.chat.limits import require_bounded
from trivium.data.chat.messages import Turn
from trivium.data.columns import FULL_WEIGHT
from trivium.data.rejects import Reason, RecordError
from trivium.data.tokenizer import CHATML_TEMPLATE
from trivium.errors import BadData, ConfigError, first_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Source: the chat_template of the models' tokenizer_config.json.
KNOWN_TEMPLATES = {
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "Qwen3",
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": "Qwen3-Base",
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "Qwen3-Instruct-2507",
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "Qwen2.5-Instruct",
    "44d5f08f3f72b837eaad09f13a54c1f9f4eb58d75240334548b7fd52a5437fa5": "Qwen2.5",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "SmolLM2-135M-Instruct",
    hashlib.sha256(CHATML_TEMPLATE.encode()).hexdigest(): "plain ChatML",
}
PROBE_ANSWER = "probe"
PROBE = (Turn("user", "probe"), Turn("assistant", PROBE_ANSWER, weight=FULL_WEIGHT))
PROBE_TOOLS = ({"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}},)
SHOWN_TOKENS = 6


@dataclass(frozen=True)
class ChatTemplate:
    """Properties of a tokenizer's chat template."""

    sha256: str
    known_as: str | None
    """Model family with this template; None if unknown."""
    end_of_turn: str
    """Special token that ends an answer."""
    end_of_turn_id: int
    has_thinking_switch: bool
    """Whether the template uses `enable_thinking`."""


class Renderer:
    """Renders conversations with a tokenizer's chat template, with the same calls as serving."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self.modes: list[bool | None] = [None]
        """Values of `enable_thinking`, the one with the longest prompt first; None if the template has no switch."""
        if "enable_thinking" in tokenizer.get_chat_template():
            self.modes = sorted((False, True), key=lambda mode: -len(self._prompt(PROBE[:1], (), mode)))

    def prompt_ids(self, history: Sequence[Turn], tools: Sequence[dict[str, Any]], thinking: bool | None) -> list[int]:
        """Token ids of the prompt that serving sends after the history.

        Raises: RecordError when the template rejects the messages.
        """
        return self._apply(history, tools, thinking, add_generation_prompt=True, tokenize=True)

    def whole_ids(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation without a generation prompt.

        Raises: RecordError when the template rejects the messages.
        """
        return self._apply(turns, tools, None, add_generation_prompt=False, tokenize=True)

    def continuation(
        self, history: Sequence[Turn], turn: Turn, tools: Sequence[dict[str, Any]], where: str
    ) -> tuple[str, bool | None]:
        """The text that an answer adds to the prompt of its history, and the `enable_thinking` of that prompt.

        With a thinking switch there are two prompts; the longest one that matches is used. The empty think block of an
        answer without reasoning is then part of the prompt, and not supervised.

        Raises: BadData when neither prompt matches, RecordError when the template rejects the messages.
        """
        prompt = whole = ""
        for thinking in self.modes:
            prompt = self._prompt(history, tools, thinking)
            whole = self.render([*history, turn], tools, thinking, add_generation_prompt=False)
            if whole.startswith(prompt):
                return whole[len(prompt) :], thinking
        raise self.mismatch(self.encode(prompt), self.encode(whole), where)

    def _prompt(self, history: Sequence[Turn], tools: Sequence[dict[str, Any]], thinking: bool | None) -> str:
        return self.render(history, tools, thinking, add_generation_prompt=True)

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[dict[str, Any]],
        thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation.

        Raises: RecordError when the template rejects the messages.
        """
        return self._apply(turns, tools, thinking, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _apply(self, turns: Sequence[Turn], tools: Sequence[dict[str, Any]], thinking: bool | None, **how: bool) -> Any:
        arguments: dict[str, Any] = dict(how) if thinking is None else {**how, "enable_thinking": thinking}
        try:
            return self._tokenizer.apply_chat_template(
                [turn.message() for turn in turns],
                tools=list(tools) or None,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
                **arguments,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template can fail in any way that a program can
            raise RecordError(Reason.TEMPLATE, f"{type(error).__name__}: {first_lines(error)}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def answer_ids(self, answer: str, where: str) -> list[int]:
        """Token ids of a rendered answer.

        Raises: BadData when they do not decode to the same text.
        """
        ids = self.encode(answer)
        decoded = self._decode(ids)
        if decoded != answer and self._normal(decoded) != self._normal(answer):
            place = next((i for i, (a, b) in enumerate(zip(decoded, answer, strict=False)) if a != b), len(decoded))
            raise BadData(
                f"{where}: the tokenizer loses text. At character {place} the answer has "
                f"{answer[place : place + 20]!r}, and its tokens decode to {decoded[place : place + 20]!r}. Expected "
                "the same text. Use the tokenizer that belongs to the model, or remove such records."
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _normal(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self._normalizer else text

    def mismatch(self, sent: list[int], trained: list[int], where: str) -> BadData:
        """The error that shows where two lists of token ids differ."""
        place = next((i for i, (a, b) in enumerate(zip(sent, trained, strict=False)) if a != b), len(trained))
        before = self._decode(sent[max(0, place - SHOWN_TOKENS) : place])
        sent, trained = (ids[place : place + SHOWN_TOKENS] for ids in (sent, trained))
        return BadData(
            f"{where}: the prompt that serving sends is not a prefix of the conversation to train on, so the labels of "
            f"this answer would be wrong. They differ at token {place}, after {before!r}: serving sends {sent} "
            f"{self._decode(sent)!r}, the conversation has {trained} {self._decode(trained)!r}. Expected "
            "apply_chat_template(history, add_generation_prompt=True) to be a prefix of "
            "apply_chat_template(history + answer). Use the model's own chat template, or correct this one."
        )


def describe_template(tokenizer: "PreTrainedTokenizerFast") -> ChatTemplate:
    """Find a chat template's properties by rendering a minimal conversation.

    A template that is not known is first rendered in a child process with little time and memory.

    Raises: ConfigError when there is no template, it needs too much time or memory, or it does not end answers with a
        special token; BadData when the prompt is not a prefix of the conversation.
    """
    name = tokenizer.name_or_path
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"Tokenizer {name} has no chat template. Conversations need one in chat_template.jinja or "
            "tokenizer_config.json; use the tokenizer of the model's chat version, or add chat_template.jinja to its "
            "folder."
        ) from None
    sha256 = hashlib.sha256(template.encode()).hexdigest()
    if sha256 not in KNOWN_TEMPLATES:
        require_bounded(lambda: _render_probes(tokenizer), f"The chat template of {name}")
    try:
        renderer = Renderer(tokenizer)
        rest, _ = renderer.continuation(PROBE[:1], PROBE[1], (), f"The chat template of {name}")
    except RecordError as error:
        raise ConfigError(
            f"The chat template of {name} cannot render a minimal conversation ({error.detail}). Use the model's own "
            "chat template, or correct this one."
        ) from None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = renderer.encode(rest[rest.rfind(PROBE_ANSWER) + len(PROBE_ANSWER) :])
    end_id = next((index for index in after if index in special), None)
    if end_id is None:
        raise ConfigError(
            f"The chat template of {name} ends an answer with {rest[-40:]!r}, without a special token. Expected one "
            "like <|im_end|>, which stops generation. Use the model's own chat template, or correct this one."
        )
    return ChatTemplate(
        sha256=sha256,
        known_as=KNOWN_TEMPLATES.get(sha256),
        end_of_turn=tokenizer.added_tokens_decoder[end_id].content,
        end_of_turn_id=end_id,
        has_thinking_switch=len(renderer.modes) > 1,
    )


def _render_probes(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Render short conversations of every kind, whether or not the template accepts them."""
    renderer = Renderer(tokenizer)
    for turns in (PROBE, (Turn("system", "probe"), *PROBE, *PROBE), (*PROBE, PROBE[0])):
        for tools in ((), PROBE_TOOLS):
            for has_prompt in (False, True):
                with suppress(RecordError):
                    renderer.render(turns, tools, None, add_generation_prompt=has_prompt)
