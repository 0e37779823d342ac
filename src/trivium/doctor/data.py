"""Rules about what the rows became: templates, turns that did not fit, reasoning, tools, control tokens.

They read the stores' reports, the tokenizer's template, and the first conversations of each source. Imported by
`examine.py`.
"""

import unicodedata
from contextlib import suppress

import numpy as np

from trivium.data.chat.formats import Conversation
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ChatEncoder
from trivium.data.rejects import Reason, RecordError
from trivium.doctor.case import Case
from trivium.doctor.findings import Rule, Trouble
from trivium.errors import BadData

SHORTENED_SHARE = 0.01
SYSTEM_SHARE = 0.99
UINT16_TOKENS = 1 << 16
SMALL_CORPUS_TOKENS = 10_000_000


def too_long(case: Case) -> Trouble | None:
    """Q03: answers that were dropped, cut or refused because they are longer than a row."""
    reports = [built.report for built in case.job.built if built.report.get("conversations")]
    rows = sum(report["records"] for report in reports)
    refused = sum(report["rejected_by_reason"].get(Reason.LONGER_THAN_SEQ_LEN.value, 0) for report in reports)
    dropped, cut = (sum(report[key] for report in reports) for key in ("dropped_turns", "cut_turns"))
    if refused + dropped + cut <= SHORTENED_SHARE * rows:
        return None
    return Trouble(
        "warning",
        f"of {rows:,} rows {refused:,} were left out whole, {dropped:,} answers of others too, and {cut:,} answers "
        f"were cut, since they are longer than data.seq_len {case.run.data.seq_len:,}.",
        f"at most {SHORTENED_SHARE:.0%} of them: the model learns least of what is longest, and of a cut answer it "
        "learns to stop too early.",
        "raise data.seq_len, or set data.overlong: split, which keeps the answers and shortens what stands before.",
    )


def unknown_template(case: Case) -> Trouble | None:
    """Q12: a chat template that nobody has checked."""
    template = case.template
    if not case.job.has_conversations or template is None or template.known_as:
        return None
    return Trouble(
        "warning",
        f"the chat template of {case.job.tokenizer_folder} (SHA-256 {template.sha256[:12]}) is not a known one.",
        "a template that Qwen has published, or Trivium's own; every answer was still proven to follow what this one "
        "sends.",
        "look at some samples with trivium data inspect, and serve with this very template: the result carries it.",
    )


def reasoning_of(turn: Turn) -> str:
    """What a turn thinks before it answers, in its own field or inside the content; empty when nothing."""
    if turn.reasoning is not None:
        return turn.reasoning.strip()
    return turn.content.partition("</think>")[0].replace("<think>", "", 1).strip() if turn.thinks else ""


def reasoning_lost(case: Case) -> Trouble | None:
    """Q15: reasoning that the template leaves out, so that it is never learnt."""
    if case.run.loss_tokens == "all":
        lost, what = reasoning_lost_whole(case), "answers looked at"
    else:
        lost, what = sum(built.report.get("lost_reasoning_turns", 0) for built in case.job.built), "answers"
    if not lost:
        return None
    return Trouble(
        "warning",
        f"the reasoning of {lost:,} {what} is stripped by the chat template and never learnt.",
        "every reasoning in a sample; with loss_tokens: assistant an answer gets a sample of its own where it must.",
        "set loss_tokens: assistant; if it is set, the template knows no reasoning: take a Qwen3 model and its "
        "template, or leave the reasoning out of the rows.",
    )


def reasoning_lost_whole(case: Case) -> int:
    """How many answers of the first conversations lose their reasoning when a conversation is rendered once, whole."""
    encoder = ChatEncoder(case.job.tokenizer, case.run.data.seq_len, all_tokens=True) if case.conversations else None
    lost = 0
    for conversation in case.conversations:
        wanted = [text for turn in conversation.turns if turn.weight and (text := reasoning_of(turn))]
        if wanted and encoder is not None:
            with suppress(RecordError):
                ids = np.concatenate([sample.ids for sample in encoder.encode(conversation).samples])
                learnt = _normal(str(case.job.tokenizer.decode(ids.tolist())))
                lost += sum(_normal(text) not in learnt for text in wanted)
    return lost


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def tool_calls_garbled(case: Case) -> Trouble | None:
    """Q16: tool calls that the template encodes twice or does not show."""
    called = [one for one in case.conversations if any(turn.tool_calls for turn in one.turns)]
    if not called or case.template is None:
        return None
    texts = [(one, _rendered(case, one)) for one in called]
    missing = sum(any(name not in text for name, _ in _calls(one)) for one, text in texts)
    twice = sum(any(f'\\"{key}\\"' in text for _, keys in _calls(one) for key in keys[:1]) for one, text in texts)
    if not missing and not twice:
        return None
    return Trouble(
        "error",
        f"of {len(called):,} conversations with tool calls looked at, the chat template leaves the calls out of "
        f"{missing:,} and writes the arguments of {twice:,} as JSON inside a JSON string.",
        "each call as the tokens that a server parses.",
        "use a template that knows tools, such as that of Qwen2.5 or Qwen3, or leave these conversations out.",
    )


def _rendered(case: Case, conversation: Conversation) -> str:
    tools = list(conversation.tools) or None
    return str(case.job.tokenizer.apply_chat_template(conversation.messages(), tools=tools, tokenize=False))


def _calls(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """The name and the arguments' names of each tool call."""
    functions = [call["function"] for turn in conversation.turns for call in turn.tool_calls]
    return [(function["name"], list(function["arguments"])) for function in functions]


def control_tokens_in_text(case: Case) -> Trouble | None:
    """Q17: conversations in which somebody wrote a control token out."""
    reports = [built.report for built in case.job.built if built.report.get("conversations")]
    taken = sum(report["control_token_records"] for report in reports)
    refused = sum(report["rejected_by_reason"].get(Reason.CONTROL_TOKEN.value, 0) for report in reports)
    if not taken and not refused:
        return None
    return Trouble(
        "warning",
        f"{taken:,} rows spell out a token such as <think> or <tool_call> in what the model reads, where serving takes "
        f"it for the token itself, and {refused:,} were refused for one such as <|im_end|>.",
        "text that cannot be taken for a turn, a thought or a tool call.",
        "see them in rejects.jsonl of the store and with trivium data inspect; sanitise what strangers may write.",
    )


def tokens_wrapped(case: Case) -> Trouble | None:
    """Q27: a store of 16-bit tokens for a vocabulary that has more."""
    num_tokens = len(case.job.tokenizer)
    narrow = [built.name for built in case.job.built if built.open().dtype.itemsize < 4]
    if num_tokens <= UINT16_TOKENS or not narrow:
        return None
    return Trouble(
        "error",
        f"{', '.join(narrow)} holds 16-bit tokens, and the tokenizer has {num_tokens:,}.",
        "32-bit tokens: larger ids wrapped around when the store was written, or it was made with another tokenizer.",
        "build the store again from its text with the run's own tokenizer.",
    )


def documents_on_chat_model(case: Case) -> Trouble | None:
    """Q28: plain documents for a model that was tuned to chat."""
    is_tuned = case.template is not None and case.template.end_of_turn_id in case.model_stop_ids
    if case.job.has_conversations or not is_tuned:
        return None
    assert case.template is not None
    return Trouble(
        "warning",
        f"the data is documents, and {case.job.weights_folder} was tuned to chat: it stops at "
        f"{case.template.end_of_turn}.",
        "a base model, since going on with documents shifts the way a chat model answers.",
        "start from the base, or mix in a source of conversations with a weight, or tune it to chat again afterwards.",
    )


def default_system(case: Case) -> Trouble | None:
    """Q30: a system prompt that is always there in training and, if nobody gives it, another one in serving."""
    if not case.conversations or case.template is None:
        return None
    given = [one.turns[0].content for one in case.conversations if one.turns[0].role == "system"]
    if len(given) < SYSTEM_SHARE * len(case.conversations):
        return None
    text = case.job.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    default = "a default of its own" if "system" in text else "none"
    what = f"the same one, {given[0][:60]!r}" if len(set(given)) == 1 else f"{len(set(given)):,} different ones"
    return Trouble(
        "info",
        f"all {len(given):,} conversations looked at begin with a system turn ({what}); where none is given the "
        f"template writes {default}, which the model never sees in training.",
        "the same beginning in training and in serving.",
        "send a system prompt of that kind when you serve, or leave it out of part of the rows.",
    )


def small_corpus(case: Case) -> Trouble | None:
    """Q33: few documents for a pretrained model; says what they can do and what not."""
    num_tokens = sum(int(np.asarray(part.store.lengths).sum(dtype=np.int64)) for part in case.job.mixture)
    if case.run.weights == "random" or case.job.has_conversations or num_tokens >= SMALL_CORPUS_TOKENS:
        return None
    epochs = case.job.batches.epoch(case.job.num_steps)
    return Trouble(
        "info",
        f"{num_tokens:,} tokens of documents are read {epochs:.1f} times.",
        "gains in the style and the words of a field, which small corpora do bring; new knowledge takes far more.",
        "watch the held-out loss, and train an adapter (method: continue with trainable: adapter) or mix in general "
        "text with a weight, so that less is forgotten.",
    )


RULES = (
    Rule[Case]("Q03", "eos-truncated", too_long),
    Rule[Case]("Q12", "template-unknown", unknown_template),
    Rule[Case]("Q15", "think-lost", reasoning_lost),
    Rule[Case]("Q16", "tool-args-string", tool_calls_garbled, BadData),
    Rule[Case]("Q17", "control-token-injection", control_tokens_in_text),
    Rule[Case]("Q27", "uint16-tokens", tokens_wrapped, BadData),
    Rule[Case]("Q28", "documents-on-chat-model", documents_on_chat_model),
    Rule[Case]("Q30", "default-system-prompt", default_system),
    Rule[Case]("Q33", "small-corpus", small_corpus),
)
