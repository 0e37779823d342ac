"""Rules about tokens: which are supervised, where samples end, and whether the model was trained on them.

They read the token stores, the tokenizer and a few rows of the model's embedding.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from trivium.doctor.findings import Rule, Violation
from trivium.doctor.prepared import PreparedRun, StoredSample
from trivium.errors import BadData, count_of
from trivium.model.card import serve_command_of_run

MIN_ENDED_SHARE = 0.99
QWEN_ROWS = (151_936, 152_064)
QWEN_TOKENS = (151_665, 151_669)
THINK, END_THINK = "<think>", "</think>"
MAX_EMPTY_THINK_TOKENS = 4


def end_not_supervised(prepared: PreparedRun) -> Violation | None:
    """Q02: samples whose last supervised token is not the end of a turn or of a document."""
    supervised = [sample for sample in prepared.samples if len(sample.supervised)]
    endless = [sample for sample in supervised if _last_supervised(prepared, sample) not in prepared.job.stop_ids]
    if len(endless) <= (1 - MIN_ENDED_SHARE) * len(supervised):
        return None
    ready_made = all(sample.is_ready_made for sample in endless)
    return Violation(
        "warning" if ready_made and not prepared.job.has_conversations else "error",
        f"in {len(endless):,} of {count_of(len(supervised), 'checked sample')}, the last supervised token does not end "
        f"a turn or document, so the model does not learn to stop; one ends with "
        f"{prepared.show(_last_supervised(prepared, endless[0]))!r}.",
        f"{' or '.join(map(prepared.show, prepared.job.stop_ids))} as the last supervised token of at least "
        f"{MIN_ENDED_SHARE:.0%} of the samples.",
        "rebuild the token store with an end token after each document (Megatron's --append-eod)."
        if ready_made
        else "use the model's own tokenizer and chat template.",
    )


def _last_supervised(prepared: PreparedRun, sample: StoredSample) -> int:
    """The last supervised token, ignoring the line break that a template writes after a turn."""
    *before, last = [int(token) for token in sample.ids[sample.supervised[-2:]]]
    if last in prepared.job.stop_ids or not before or not str(prepared.job.tokenizer.decode([last])).isspace():
        return last
    return before[0]


def untrained_and_frozen(prepared: PreparedRun) -> Violation | None:
    """Q04: control tokens in the data with untrained embedding rows that this run keeps frozen."""
    adapter, pretrained = prepared.run.adapter, prepared.job.pretrained_tokens
    if adapter is None or adapter.train_tokens is None or pretrained is None:
        return None  # the run trains all rows, or finds the untrained ones itself
    named = set(prepared.job.tokenizer.convert_tokens_to_ids(adapter.train_tokens))
    used = set(np.unique(np.concatenate([sample.ids for sample in prepared.samples])).tolist())
    frozen = [token for token in pretrained.untrained(used) if token not in named]
    if not frozen:
        return None
    return Violation(
        "error",
        f"the data uses {', '.join(map(prepared.show, frozen))}, but {pretrained.folder} has untrained embedding rows "
        "for these tokens (zero or like an unused token's, and the model never uses them), and adapter.train_tokens "
        "leaves them frozen.",
        "trained rows; otherwise the model cannot use these tokens, and may never stop.",
        "remove adapter.train_tokens, or add these tokens to it.",
    )


def generation_never_ends(prepared: PreparedRun) -> Violation | None:
    """Q05: an adapter of a base model whose generation_config.json does not stop at the end of a turn."""
    template = prepared.template
    if not prepared.job.has_conversations or template is None:
        return None
    run = prepared.run
    if run.adapter is None or template.end_of_turn_id in prepared.model_stop_ids:
        return None
    folder = Path(run.runs_dir) / run.name / "adapter"
    command = serve_command_of_run(str(run.model.name), folder, run.adapter, bool(prepared.job.trained_tokens))
    merged = f"trivium export {shlex.quote(str(folder.parent))} --merge --out FOLDER"
    return Violation(
        "warning",
        "the base model's generation_config.json stops at "
        f"{', '.join(map(prepared.show, prepared.model_stop_ids)) or 'nothing'}, not at {template.end_of_turn}. The "
        "adapter's file does, but servers that load an adapter read the base model's.",
        f"{template.end_of_turn} among the stop tokens.",
        f"serve the merged model ({merged})"
        + (f", or give the server the adapter's file: {command}" if command else "")
        + f", or send the stop token {template.end_of_turn_id} with each request. trivium chat and eval read the "
        "adapter's file.",
    )


def fewer_rows(prepared: PreparedRun) -> Violation | None:
    """Q10: an embedding with fewer rows than the published model's."""
    published = prepared.model_config.get("vocab_size")
    if not isinstance(published, int) or prepared.job.shape.vocab_size >= published:
        return None
    return Violation(
        "error",
        f"the run's embedding has {prepared.job.shape.vocab_size:,} rows, but the model's has {published:,}.",
        "the published number of rows; those after the tokenizer's last token are reserved for new tokens.",
        "remove model.vocab_size.",
    )


def foreign_tokenizer(prepared: PreparedRun) -> Violation | None:
    """Q11: token ids beyond the embedding, or another tokenizer than the model was trained with."""
    job, num_tokens = prepared.job, len(prepared.job.tokenizer)
    largest = max(int(sample.ids.max()) for sample in prepared.samples if len(sample.ids))
    if largest >= job.shape.vocab_size:
        return Violation(
            "error",
            f"the data has token {largest:,}, but the model's embedding has only {job.shape.vocab_size:,} rows.",
            "token ids below the number of rows.",
            "rebuild the token store with the model's own tokenizer.",
        )
    foreign = [token for token in prepared.model_stop_ids if token not in job.tokenizer.added_tokens_decoder]
    is_odd = job.weights_folder is not None and job.shape.vocab_size in QWEN_ROWS and num_tokens not in QWEN_TOKENS
    if not foreign and not is_odd:
        return None
    size = f"the tokenizer has {num_tokens:,} tokens; Qwen2.5's has {QWEN_TOKENS[0]:,} and Qwen3's {QWEN_TOKENS[1]:,}"
    shown = ", ".join(f"{token} ({prepared.show(token)})" if token < num_tokens else str(token) for token in foreign)
    return Violation(
        "warning",
        f"{size}." if is_odd else f"the model stops at {shown}, which is not a control token of the run's tokenizer.",
        "the tokenizer that the model was trained with.",
        "remove tokenizer to use the model's own. If you added tokens yourself, ignore this.",
    )


def not_after_prompt(prepared: PreparedRun) -> Violation | None:
    """Q13: supervised answers that do not follow the generation prompt."""
    masked = [sample for sample in prepared.samples if len(sample.weights) and not sample.weights[0]]
    if not masked or prepared.template is None:
        return None
    prompts = answer_prompts(prepared.job.tokenizer)
    wrong = [
        sample.ids[max(0, start - 8) : start + 4]
        for sample in masked
        for start in supervised_starts(sample)
        if not any(sample.ids[max(0, start - len(prompt)) : start].tolist() == prompt for prompt in prompts)
    ]
    if not wrong:
        return None
    return Violation(
        "error" if prepared.template.known_as else "warning",
        f"found {count_of(len(wrong), 'supervised answer')} that the generation prompt does not precede, for example "
        f"{prepared.job.tokenizer.decode(wrong[0])!r}.",
        "answers right after the template's generation prompt, "
        f"{' or '.join(repr(prepared.job.tokenizer.decode(prompt)) for prompt in prompts)}.",
        "use the model's own chat template; trivium data inspect STORE --tokenizer FOLDER shows which tokens are "
        "supervised.",
    )


def answer_prompts(tokenizer: Any) -> list[list[int]]:
    """The token ids of the generation prompt; two if the template has a thinking switch."""
    question = [{"role": "user", "content": "?"}]
    prompts = []
    for thinking in (False, True):
        whole, asked = (
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=add, enable_thinking=thinking)
            for add in (False, True)
        )
        ids = tokenizer(asked.removeprefix(whole), add_special_tokens=False).input_ids
        if asked.startswith(whole) and ids not in prompts:
            prompts.append(ids)
    return prompts


def supervised_starts(sample: StoredSample) -> list[int]:
    """Positions at which consecutive supervised tokens start."""
    return np.flatnonzero(np.diff(np.concatenate([[0], sample.weights > 0]).astype(np.int8)) == 1).tolist()


def empty_think_supervised(prepared: PreparedRun) -> Violation | None:
    """Q14: a supervised empty think block before answers without reasoning."""
    control = prepared.job.tokenizer.get_added_vocab()
    if prepared.template is None or not prepared.template.has_thinking_switch or THINK not in control:
        return None
    count = sum(_supervises_empty_think(prepared, sample, control[THINK]) for sample in prepared.samples)
    if not count:
        return None
    return Violation(
        "warning",
        f"in {count:,} of {count_of(len(prepared.samples), 'checked sample')}, the model is trained to write an empty "
        "think block.",
        "the block in the prompt, where serving with enable_thinking=False puts it; otherwise the model forgets how to "
        "reason.",
        "set loss_tokens: assistant, which leaves the block in the prompt, or add conversations with reasoning.",
    )


def _supervises_empty_think(prepared: PreparedRun, sample: StoredSample, begin: int) -> bool:
    for index in np.flatnonzero((sample.ids == begin) & (sample.weights > 0)).tolist():
        after = sample.ids[index + 1 : index + MAX_EMPTY_THINK_TOKENS]
        thought, closed, _ = str(prepared.job.tokenizer.decode(after.tolist())).partition(END_THINK)
        if closed and not thought.strip():
            return True
    return False


def nothing_or_all_supervised(prepared: PreparedRun) -> Violation | None:
    """Q18: samples without supervised tokens, or conversations with supervised user messages."""
    nothing = [sample for sample in prepared.samples if not len(sample.supervised)]
    if nothing:
        return Violation(
            "warning" if all(sample.is_ready_made for sample in nothing) else "error",
            f"found no supervised token in {len(nothing):,} of {count_of(len(prepared.samples), 'checked sample')}.",
            "at least one in each sample; samples without one cost time and teach nothing.",
            "remove documents of a single token, and give at least one answer of each conversation a weight above 0.",
        )
    if prepared.run.loss_tokens == "all" or prepared.template is None:
        return None
    turn_end = prepared.template.end_of_turn_id
    whole = sum(bool(sample.weights.all() and (sample.ids == turn_end).sum() > 1) for sample in prepared.samples)
    if not whole:
        return None
    return Violation(
        "warning",
        f"in {whole:,} of {count_of(len(prepared.samples), 'checked sample')}, every token of what looks like a "
        f"conversation ({prepared.template.end_of_turn}) is supervised, user messages included.",
        "supervised answers only, since loss_tokens is assistant.",
        "train on the file of conversations instead of an external store, or set loss_tokens: all.",
    )


RULES = (
    Rule[PreparedRun]("Q02", "eos-not-supervised", end_not_supervised, BadData),
    Rule[PreparedRun]("Q04", "base-chatml-frozen", untrained_and_frozen),
    Rule[PreparedRun]("Q05", "generation-eos", generation_never_ends),
    Rule[PreparedRun]("Q10", "vocab-shrink", fewer_rows),
    Rule[PreparedRun]("Q11", "token-id-range", foreign_tokenizer, BadData),
    Rule[PreparedRun]("Q13", "not-prefix", not_after_prompt, BadData),
    Rule[PreparedRun]("Q14", "think-empty-trained", empty_think_supervised),
    Rule[PreparedRun]("Q18", "all-masked", nothing_or_all_supervised, BadData),
)
