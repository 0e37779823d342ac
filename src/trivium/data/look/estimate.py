"""Estimate the tokens of texts and conversations without a tokenizer, for the planner.

The figures are of the tokenizer of Qwen2.5 and Qwen3, which are the same but for a few special tokens.
"""

import json
import re
from typing import NamedTuple

from trivium.data.chat.formats import Conversation, Document
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ConversationSettings
from trivium.data.rejects import Reason, Reject
from trivium.data.store.tally import Tally

# Qwen's tokenizer splits text into words, digits, runs of punctuation and white space before it looks anything up, and
# in English and code most of these pieces are one token. Counting pieces is within 4 % for English prose,
# conversations, Python and tool calls, and within 10 % for C; bytes per token would vary from 3.5 to 5.0 there. Long
# words are several pieces. German, Dutch and Scandinavian have up to a quarter more tokens than this counts.
LETTER = r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"
PIECES = re.compile(
    rf"'(?:s|t|re|ve|m|ll|d)|[^\r\n\w]?(?<!{LETTER}){LETTER}{{1,11}}|{LETTER}{{1,3}}|\d"
    r"| ?[!-/:-@\[-`{-~]{1,3}[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+(?![^\x00-\x7f])"
)
TOKENS_PER_PIECE = 1.03

# UTF-8 bytes per token by script, from Qwen3's tokenizer on Django's translations and on a course in 22 languages.
SCRIPTS: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"[\u0080-\u036f]+"), 1.2),  # accents of Latin letters, in addition to their words
    (re.compile(r"[\u1e00-\u1eff]+"), 9.0),  # Vietnamese
    (re.compile(r"[\u0370-\u03ff]+"), 2.0),  # Greek
    (re.compile(r"[\u0400-\u052f]+"), 5.7),  # Cyrillic: Russian; Ukrainian and Bulgarian have a quarter more tokens
    (re.compile(r"[\u0590-\u06ff]+"), 4.5),  # Hebrew, Arabic
    (re.compile(r"[\u0e00-\u0e7f]+"), 5.2),  # Thai
    (re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+"), 3.6),  # Hangul
    (re.compile(r"[\u2010-\u2027]+"), 3.0),  # typographic quotes and dashes
    (re.compile(r"[\u3000-\u312f\u3400-\u9fff\uff00-\uffef]+"), 4.6),  # Han, kana
)
OTHER_BYTES_PER_TOKEN = 2.7


class TemplateTokens(NamedTuple):
    """What a chat template adds to a conversation."""

    system: int = 0
    """Tokens of the system message that is added if there is none."""
    think: int = 0
    """Tokens of the empty think block before an answer."""
    is_split: bool = False
    """Whether every answer becomes a sample, because the think block is left out of later prompts."""


MESSAGE_TOKENS = 5
"""Around each message: <|im_start|>, role, newline, <|im_end|>, newline."""
START_TOKENS = 3
"""The first three of them."""
TOOLS_TOKENS, RESPONSE_TOKENS, CALL_TOKENS = 78, 9, 4
"""Around the list of tools, the response of a tool, and a call."""


def template_tokens(model: str) -> TemplateTokens:
    """What the chat template of a model adds, by the model's name. Counted with the published templates."""
    name = model.lower()
    if "qwen3" in name and "2507" not in name:
        return TemplateTokens(think=4, is_split=True)
    if "qwen2.5" in name:
        return TemplateTokens(system=21 if "instruct" in name else 11)
    return TemplateTokens()


def estimated_tokens(text: str) -> int:
    """Estimate the tokens of a text; at least 1."""
    num_tokens, num_bytes = TOKENS_PER_PIECE * len(PIECES.findall(text)), 0
    if not text.isascii():
        num_bytes = sum(len(run.encode("utf-8", "surrogatepass")) for run in re.findall(r"[^\x00-\x7f]+", text))
    for pattern, bytes_per_token in SCRIPTS:
        if not num_bytes:
            break
        found = sum(len(run.encode()) for run in pattern.findall(text))
        num_tokens += found / bytes_per_token
        num_bytes -= found
    return max(1, round(num_tokens + num_bytes / OTHER_BYTES_PER_TOKEN))


def estimate(
    content: Document | Conversation | Reject, tally: Tally, template: TemplateTokens, settings: ConversationSettings
) -> None:
    """Add a record with its estimated tokens to a tally."""
    if isinstance(content, Document):
        tally.num_samples += 1
        tally.num_tokens += estimated_tokens(content.text) + 1  # and the end token
    elif isinstance(content, Conversation):
        _estimate_conversation(content, tally, template, settings)
    else:
        tally.rejected_by_reason[content.reason] += 1


def _estimate_conversation(
    conversation: Conversation, tally: Tally, template: TemplateTokens, settings: ConversationSettings
) -> None:
    """Add the samples of a conversation: one in all, or one for each answer if the template splits it."""
    history = 0 if conversation.turns[0].role == "system" else template.system
    if conversation.tools:
        history += TOOLS_TOKENS + estimated_tokens(json.dumps(conversation.tools, ensure_ascii=False))
    lengths, num_supervised = [], 0
    for index, turn in enumerate(conversation.turns):
        read, thought = _turn_tokens(turn), estimated_tokens(turn.reasoning) if turn.reasoning else 0
        length = history + START_TOKENS + template.think + thought + read + 1
        if turn.weight and index and (length <= settings.seq_len or settings.overlong == "truncate"):
            lengths.append(min(length, settings.seq_len))
            num_supervised += read + thought + 1 + (template.think if thought else 0)
        history += read + MESSAGE_TOKENS + (0 if template.is_split else thought)
    if settings.all_tokens:
        lengths, num_supervised = [history], history
    if not lengths:
        tally.rejected_by_reason[Reason.LONGER_THAN_SEQ_LEN] += 1
        return
    samples = lengths if template.is_split else lengths[-1:]
    if len(samples) > 1:
        tally.split += 1
        tally.num_split_samples += len(samples)
    tally.conversations += 1
    tally.num_samples += len(samples)
    tally.num_tokens += sum(samples)
    tally.supervised_tokens += num_supervised
    tally.reasoning_documents += any(turn.weight and turn.thinks for turn in conversation.turns)


def _turn_tokens(turn: Turn) -> int:
    """Tokens of the content and the calls of a message."""
    num_tokens = estimated_tokens(turn.content) if turn.content else 0
    for call in turn.tool_calls:
        num_tokens += CALL_TOKENS + estimated_tokens(json.dumps(call.get("function", call), ensure_ascii=False))
    return num_tokens + (RESPONSE_TOKENS if turn.role == "tool" else 0)
