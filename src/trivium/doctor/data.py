"""Rules about the data: chat templates, sequence length, reasoning, tool calls, control tokens in text.

They read the reports of the token stores, the chat template, and the first conversations of each source.
"""

import json
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np

from trivium.data.chat.formats import Conversation
from trivium.data.chat.messages import Turn
from trivium.data.chat.samples import ChatEncoder
from trivium.data.rejects import Reason, RecordError
from trivium.data.source.blocks import file_kind, list_files, open_decompressed
from trivium.doctor.findings import Rule, Violation
from trivium.doctor.prepared import PreparedRun
from trivium.errors import BadData, count_of

SHORTENED_SHARE = 0.01
SYSTEM_SHARE = 0.99
UINT16_TOKENS = 1 << 16
SMALL_CORPUS_TOKENS = 10_000_000
MAX_TEXT_FILES, TEXT_BYTES_READ, MAX_LINES_READ = 64, 1 << 18, 8


def too_long(prepared: PreparedRun) -> Violation | None:
    """Q03: answers that were rejected, dropped or cut because they are longer than a packed sequence."""
    reports = [built.report for built in prepared.job.built if built.report.get("conversations")]
    records = sum(report["records"] for report in reports)
    rejected = sum(report["rejected_by_reason"].get(Reason.LONGER_THAN_SEQ_LEN.value, 0) for report in reports)
    dropped, cut = (sum(report[key] for report in reports) for key in ("dropped_turns", "cut_turns"))
    if rejected + dropped + cut <= SHORTENED_SHARE * records:
        return None
    return Violation(
        "warning",
        f"found {rejected:,} of {count_of(records, 'record')} rejected, {count_of(dropped, 'answer')} dropped from the "
        f"others, and {count_of(cut, 'answer')} cut, because they are longer than data.seq_len "
        f"{prepared.run.data.seq_len:,}.",
        f"at most {SHORTENED_SHARE:.0%} of the records; otherwise the model rarely sees long answers.",
        "raise data.seq_len, or set data.overlong: split, which keeps the answers and shortens their prompts.",
    )


def unknown_template(prepared: PreparedRun) -> Violation | None:
    """Q12: an unknown chat template."""
    template = prepared.template
    if not prepared.job.has_conversations or template is None or template.known_as:
        return None
    return Violation(
        "warning",
        f"the chat template of {prepared.job.tokenizer_folder} (SHA-256 {template.sha256[:12]}) is unknown.",
        "a template of Qwen, SmolLM2 or Trivium. Every answer was still checked against this one's generation prompt.",
        "look at some samples with trivium data inspect FILE --tokenizer FOLDER, and serve with this template, which "
        "is saved with the model.",
    )


def reasoning_of(turn: Turn) -> str:
    """The reasoning of a message, from its reasoning field or its content; may be empty."""
    if turn.reasoning is not None:
        return turn.reasoning.strip()
    return turn.content.partition("</think>")[0].replace("<think>", "", 1).strip() if turn.thinks else ""


def reasoning_lost(prepared: PreparedRun) -> Violation | None:
    """Q15: reasoning that the template leaves out."""
    if prepared.run.loss_tokens == "all":
        lost, what = reasoning_lost_whole(prepared), "sampled answer"
    else:
        lost, what = sum(built.report.get("lost_reasoning_turns", 0) for built in prepared.job.built), "answer"
    if not lost:
        return None
    return Violation(
        "warning",
        f"the chat template strips the reasoning of {count_of(lost, what)}, so the model never learns it.",
        "samples that keep all reasoning.",
        "set loss_tokens: assistant, which makes a separate sample for each answer with reasoning. If it is already "
        "set, the template does not support reasoning: use a Qwen3 model, or remove the reasoning from the records.",
    )


def reasoning_lost_whole(prepared: PreparedRun) -> int:
    """Number of answers in the first conversations whose reasoning is lost if each is rendered once."""
    if not prepared.conversations:
        return 0
    encoder = ChatEncoder(prepared.job.tokenizer, prepared.run.data.seq_len, all_tokens=True)
    lost = 0
    for conversation in prepared.conversations:
        wanted = [text for turn in conversation.turns if turn.weight and (text := reasoning_of(turn))]
        if wanted:
            with suppress(RecordError):
                ids = np.concatenate([sample.ids for sample in encoder.encode(conversation).samples])
                rendered = _normal(str(prepared.job.tokenizer.decode(ids.tolist())))
                lost += sum(_normal(text) not in rendered for text in wanted)
    return lost


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def tool_calls_garbled(prepared: PreparedRun) -> Violation | None:
    """Q16: tool calls that the template omits or JSON-encodes twice."""
    called = [one for one in prepared.conversations if any(turn.tool_calls for turn in one.turns)]
    if not called or prepared.template is None:
        return None
    render = prepared.job.tokenizer.apply_chat_template
    texts = [(one, str(render(one.messages(), tools=list(one.tools) or None, tokenize=False))) for one in called]
    missing = sum(any(name not in text for name, _ in _calls(one)) for one, text in texts)
    twice = sum(any(f'\\"{key}\\"' in text for _, keys in _calls(one) for key in keys[:1]) for one, text in texts)
    if not missing and not twice:
        return None
    return Violation(
        "error",
        f"of {count_of(len(called), 'sampled conversation')} with tool calls, the chat template leaves the calls out "
        f"of {missing:,} and writes the arguments of {twice:,} as JSON inside a JSON string.",
        "tool calls in the format that servers parse.",
        "use a template that supports tools, for example Qwen2.5's or Qwen3's, or remove these conversations.",
    )


def _calls(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """The name and the argument names of each tool call."""
    functions = [call["function"] for turn in conversation.turns for call in turn.tool_calls]
    return [(function["name"], list(function["arguments"])) for function in functions]


def control_tokens_in_text(prepared: PreparedRun) -> Violation | None:
    """Q17: control tokens spelled out in the text of conversations."""
    reports = [built.report for built in prepared.job.built if built.report.get("conversations")]
    taken = sum(report["control_token_records"] for report in reports)
    rejected = sum(report["rejected_by_reason"].get(Reason.CONTROL_TOKEN.value, 0) for report in reports)
    if not taken and not rejected:
        return None
    return Violation(
        "warning",
        f"found {count_of(taken, 'record')} with text like <think> or <tool_call>, which becomes the control token, "
        f"and {count_of(rejected, 'rejected record')} with text like <|im_end|>.",
        "text without control tokens.",
        "find the rejected records in rejects.jsonl of the token store, the others with trivium data inspect FILE "
        "--tokenizer FOLDER; escape untrusted input.",
    )


def tokens_wrapped(prepared: PreparedRun) -> Violation | None:
    """Q27: 16-bit tokens for a vocabulary of more than 65,536."""
    num_tokens = len(prepared.job.tokenizer)
    narrow = [built.name for built in prepared.job.built if built.open().dtype.itemsize < 4]
    if num_tokens <= UINT16_TOKENS or not narrow:
        return None
    return Violation(
        "error",
        f"{', '.join(narrow)}: the store has 16-bit tokens, but the tokenizer has {num_tokens:,} tokens.",
        "32-bit tokens. Either larger ids overflowed, or the store was built with another tokenizer.",
        "rebuild the token store from its text with this run's tokenizer.",
    )


def documents_on_chat_model(prepared: PreparedRun) -> Violation | None:
    """Q28: a chat model trained only on documents."""
    template = prepared.template
    if prepared.job.has_conversations or template is None or template.end_of_turn_id not in prepared.model_stop_ids:
        return None
    return Violation(
        "warning",
        f"the data has only documents, and {prepared.job.weights_folder} is a chat model (it stops at "
        f"{template.end_of_turn}).",
        "a base model, since training a chat model on documents changes how it answers.",
        "start from the base model, add conversations to the data, or fine-tune for chat afterwards.",
    )


def default_system(prepared: PreparedRun) -> Violation | None:
    """Q30: a system prompt in every conversation, so that serving must send one too."""
    if not prepared.conversations or prepared.template is None:
        return None
    given = [one.turns[0].content for one in prepared.conversations if one.turns[0].role == "system"]
    if len(given) < SYSTEM_SHARE * len(prepared.conversations):
        return None
    text = prepared.job.tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    default = "its own default" if "system" in text else "none"
    what = f"the same one, {given[0][:60]!r}" if len(set(given)) == 1 else f"{len(set(given)):,} different ones"
    return Violation(
        "info",
        f"every sampled conversation ({len(given):,}) starts with a system prompt ({what}); without one, the template "
        f"writes {default}, which the model never sees in training.",
        "conversations that start the same way in training and in serving.",
        "send the system prompt in serving too, or remove it from some of the records.",
    )


def small_corpus(prepared: PreparedRun) -> Violation | None:
    """Q33: a pretrained model trained on few documents."""
    num_tokens = sum(int(np.asarray(part.store.lengths).sum(dtype=np.int64)) for part in prepared.job.mixture)
    if prepared.run.weights == "random" or prepared.job.has_conversations or num_tokens >= SMALL_CORPUS_TOKENS:
        return None
    epochs = prepared.job.batches.epoch(prepared.job.num_steps)
    return Violation(
        "info",
        f"the documents have only {count_of(num_tokens, 'token')}, which the run reads {epochs:.1f} times.",
        f"at least {SMALL_CORPUS_TOKENS:,} tokens; fewer teach a domain's style and vocabulary, but little knowledge.",
        "watch the held-out loss. To reduce forgetting, train an adapter (method: continue with trainable: adapter) or "
        "mix in general text.",
    )


def json_named_text(prepared: PreparedRun) -> Violation | None:
    """Q34: JSON lines in a file that is read as plain text, because of its name."""
    found = []
    for source in prepared.run.data.sources:
        files = list_files(Path(source.path).expanduser()) if source.path else []
        texts = [file.path for file in files if file_kind(file.path) == "text"]
        found += [str(path) for path in texts[:MAX_TEXT_FILES] if _has_json_lines(path)]
    if not found:
        return None
    return Violation(
        "warning",
        f"{', '.join(found[:3])}{' and others' if len(found) > 3 else ''} is read as plain text, and its first lines "
        "are JSON objects, so the model learns brackets and field names.",
        "plain text, or a file named .jsonl, whose records are found.",
        "rename it to end in .jsonl (or .jsonl.gz), if the model is not meant to write JSON.",
    )


def _has_json_lines(path: Path) -> bool:
    """Whether a text file starts with at least two JSON objects, one per line."""
    with open_decompressed(path) as stream:
        lines = [line for line in stream.read(TEXT_BYTES_READ).splitlines()[:MAX_LINES_READ] if line.strip()]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        return False


RULES = (
    Rule[PreparedRun]("Q03", "eos-truncated", too_long),
    Rule[PreparedRun]("Q12", "template-unknown", unknown_template),
    Rule[PreparedRun]("Q15", "think-lost", reasoning_lost),
    Rule[PreparedRun]("Q16", "tool-args-string", tool_calls_garbled, BadData),
    Rule[PreparedRun]("Q17", "control-token-injection", control_tokens_in_text),
    Rule[PreparedRun]("Q27", "uint16-tokens", tokens_wrapped, BadData),
    Rule[PreparedRun]("Q28", "documents-on-chat-model", documents_on_chat_model),
    Rule[PreparedRun]("Q30", "default-system-prompt", default_system),
    Rule[PreparedRun]("Q33", "small-corpus", small_corpus),
    Rule[PreparedRun]("Q34", "json-named-text", json_named_text),
)
