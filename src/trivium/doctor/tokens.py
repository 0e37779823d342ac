"""Rules about token ids: what is learnt, where it ends, and whether the model knows the tokens.

They read the stores, the first batch, the tokenizer and rows of the model's embedding. What Trivium's own construction
makes impossible is checked all the same, so that a change of it would be caught. Imported by `examine.py`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from trivium.data.batch.pack import NO_LABEL, Batch
from trivium.data.columns import loss_weights
from trivium.doctor.case import Case, Sample
from trivium.doctor.findings import Rule, Trouble
from trivium.engine.build import untrained_tokens
from trivium.errors import BadData, TriviumError

MIN_ENDED_SHARE = 0.99
QWEN_ROWS = (151_936, 152_064)
QWEN_TOKENS = (151_665, 151_669)
THINK, END_THINK = "<think>", "</think>"
MAX_EMPTY_THINK_TOKENS = 4


def pad_equals_end(case: Case) -> Trouble | None:
    """Q01: ends of turns or documents that the store has as labels and the first batch has not."""
    batch = case.job.batches.step(0)[0]
    wanted = kept = 0
    for expected, labels in _labels(case, batch):
        ends = np.isin(expected, case.job.stop_ids)
        wanted += int(ends.sum())
        kept += int((labels[ends] == expected[ends]).sum())
    if kept == wanted:
        return None
    tokenizer = case.job.tokenizer
    return Trouble(
        "error",
        f"the first batch teaches {kept:,} of the {wanted:,} ends of turns and documents that its samples have; "
        f"pad_token is {tokenizer.pad_token} and the model stops at {', '.join(map(case.show, case.job.stop_ids))}.",
        "every end as a label, whatever the pad token is: padding is masked by its place, never by its id.",
        "this is a fault of Trivium's packing, not of your data; report it with the run file.",
    )


def _labels(case: Case, batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each piece of a batch the labels that its store gives, and those that the batch has."""
    stores = case.job.batches.stores
    begin = 0
    for source, document, start, stop in batch.spans.tolist():
        store, end = stores[source], begin + stop - start
        past = min(stop + 1, int(store.lengths[document]))
        ids = store.tokens(document, start, past)[1:].astype(np.int64)
        weights = loss_weights(store, document, start, past)
        expected = ids if weights is None else np.where(weights[1:] == 0, NO_LABEL, ids)
        expected[[border - start - 1 for border in store.sequence_starts(document, start, past)]] = NO_LABEL
        yield expected, batch.labels[begin:end].numpy()[: len(expected)]
        begin = end


def end_not_learnt(case: Case) -> Trouble | None:
    """Q02: samples whose last learnt token is not the end of a turn or of a document."""
    learnt = [sample for sample in case.samples if len(sample.supervised)]
    endless = [sample for sample in learnt if _last_learnt(case, sample) not in case.job.stop_ids]
    if len(endless) <= (1 - MIN_ENDED_SHARE) * len(learnt):
        return None
    ready_made = all(sample.is_ready_made for sample in endless)
    return Trouble(
        "warning" if ready_made and not case.job.has_conversations else "error",
        f"{len(endless):,} of {len(learnt):,} samples looked at do not teach the model to stop; one ends with "
        f"{case.show(_last_learnt(case, endless[0]))!r}.",
        f"{' or '.join(map(case.show, case.job.stop_ids))} as the last learnt token of at least "
        f"{MIN_ENDED_SHARE:.0%} of the samples.",
        "build the store with an end after each document (Megatron's --append-eod)."
        if ready_made
        else "use the chat template that belongs to the model, and the model's own tokenizer.",
    )


def _last_learnt(case: Case, sample: Sample) -> int:
    """The last learnt token; the line break that a template writes after a turn does not count."""
    *before, last = [int(token) for token in sample.ids[sample.supervised[-2:]]]
    if last in case.job.stop_ids or not before or not str(case.job.tokenizer.decode([last])).isspace():
        return last
    return before[0]


def untrained_and_frozen(case: Case) -> Trouble | None:
    """Q04: control tokens that the data uses, whose rows the model never learnt and the run leaves out."""
    adapter, folder = case.run.adapter, case.job.weights_folder
    if adapter is None or adapter.train_tokens is None or folder is None:
        return None  # all rows are trained, or those that need it by themselves
    named = set(case.job.tokenizer.convert_tokens_to_ids(adapter.train_tokens))
    used = set(np.unique(np.concatenate([sample.ids for sample in case.samples])).tolist())
    frozen = [token for token in untrained_tokens(case.job, used) if token not in named]
    if not frozen:
        return None
    return Trouble(
        "error",
        f"the data uses {', '.join(map(case.show, frozen))}, whose rows in {folder} are zero or point where another "
        "unused token's does, and adapter.train_tokens leaves them frozen.",
        "rows that are trained, in the model or beside the adapter; the result could neither read nor write them, so "
        "it would never stop.",
        "leave adapter.train_tokens out, or name them too.",
    )


def generation_never_ends(case: Case) -> Trouble | None:
    """Q05: where the result, or the base that servers read for an adapter, does not stop at the end of a turn."""
    template = case.template
    if not case.job.has_conversations or template is None:
        return None
    if template.end_of_turn_id not in case.job.stop_ids:
        return Trouble(
            "error",
            f"answers end with {template.end_of_turn}, and the result would stop only at "
            f"{', '.join(map(case.show, case.job.stop_ids))}.",
            "the end of a turn among the tokens that generation_config.json stops at.",
            "this is a fault of Trivium's setup, not of your data; report it with the run file.",
        )
    if case.run.adapter is None or template.end_of_turn_id in case.model_stop_ids:
        return None
    return Trouble(
        "warning",
        f"the base's generation_config.json stops at {', '.join(map(case.show, case.model_stop_ids)) or 'nothing'}, "
        f"not at {template.end_of_turn}. The adapter's own will, but a server that loads an adapter on its base reads "
        "the base's.",
        f"{template.end_of_turn} among the tokens that generation stops at.",
        "serve the merged model (trivium export --merge), or give the server the adapter's generation_config.json or "
        f"the stop token {template.end_of_turn_id}. trivium chat and eval read the adapter's.",
    )


def fewer_rows(case: Case) -> Trouble | None:
    """Q10: an embedding table that would lose rows."""
    published = case.model_config.get("vocab_size")
    if not isinstance(published, int) or case.job.shape.vocab_size >= published:
        return None
    return Trouble(
        "error",
        f"the run's table has {case.job.shape.vocab_size:,} rows and the model's {published:,}: "
        f"{published - case.job.shape.vocab_size:,} would be deleted.",
        "the table as it was published; the rows past the tokenizer's last token are spare ones for new tokens.",
        "leave model.vocab_size out.",
    )


def foreign_tokenizer(case: Case) -> Trouble | None:
    """Q11: ids without a row, or a tokenizer that the model was not trained with."""
    job, num_tokens = case.job, len(case.job.tokenizer)
    largest = max(int(sample.ids.max()) for sample in case.samples if len(sample.ids))
    if largest >= job.shape.vocab_size:
        return Trouble(
            "error",
            f"the data holds token {largest:,}, and the model's table has {job.shape.vocab_size:,} rows.",
            "ids below the number of rows.",
            "build the store with the model's own tokenizer.",
        )
    strangers = [token for token in case.model_stop_ids if token not in job.tokenizer.added_tokens_decoder]
    is_odd = job.weights_folder is not None and job.shape.vocab_size in QWEN_ROWS and num_tokens not in QWEN_TOKENS
    if not strangers and not is_odd:
        return None
    size = f"the tokenizer has {num_tokens:,} tokens; Qwen2.5's has {QWEN_TOKENS[0]:,} and Qwen3's {QWEN_TOKENS[1]:,}"
    shown = ", ".join(f"{token} ({case.show(token)})" if token < num_tokens else str(token) for token in strangers)
    return Trouble(
        "warning",
        f"{size}." if is_odd else f"the model stops at {shown}, which is no end in the tokenizer of the run.",
        "the tokenizer that the model was trained with.",
        "leave tokenizer out to take the model's own; tokens that you added yourself need no change.",
    )


def not_after_prompt(case: Case) -> Trouble | None:
    """Q13: learnt answers that do not follow what serving sends before an answer."""
    masked = [sample for sample in case.samples if len(sample.weights) and not sample.weights[0]]
    if not masked or case.template is None:
        return None
    prompts = answer_prompts(case.job.tokenizer)
    wrong = [
        sample.ids[max(0, start - 8) : start + 4]
        for sample in masked
        for start, _ in learnt_runs(sample)
        if not any(sample.ids[max(0, start - len(prompt)) : start].tolist() == prompt for prompt in prompts)
    ]
    if not wrong:
        return None
    return Trouble(
        "error" if case.template.known_as else "warning",
        f"{len(wrong):,} learnt answers do not begin where serving would let the model begin, such as in "
        f"{case.job.tokenizer.decode(wrong[0])!r}.",
        "each to follow what the template adds when an answer is asked for, "
        f"{' or '.join(repr(case.job.tokenizer.decode(prompt)) for prompt in prompts)}.",
        "see with trivium data inspect what is learnt; use the model's own chat template.",
    )


def answer_prompts(tokenizer: Any) -> list[list[int]]:
    """The tokens that serving puts before an answer: one way, or one for each position of a thinking switch."""
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


def learnt_runs(sample: Sample) -> list[tuple[int, int]]:
    """Where stretches of learnt tokens begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.weights > 0, [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def empty_think_learnt(case: Case) -> Trouble | None:
    """Q14: the empty think block of answers without reasoning among the learnt tokens."""
    control = case.job.tokenizer.get_added_vocab()
    if case.template is None or not case.template.has_thinking_switch or THINK not in control:
        return None
    count = sum(_learns_empty_think(case, sample, control[THINK]) for sample in case.samples)
    if not count:
        return None
    return Trouble(
        "warning",
        f"{count:,} of {len(case.samples):,} samples looked at teach the model to write an empty think block.",
        "the block in the prompt, where serving with enable_thinking=False puts it; learnt, it unteaches thinking.",
        "set loss_tokens: assistant, which leaves it in the prompt; or mix in conversations with reasoning.",
    )


def _learns_empty_think(case: Case, sample: Sample, begin: int) -> bool:
    for place in np.flatnonzero((sample.ids == begin) & (sample.weights > 0)).tolist():
        after = sample.ids[place + 1 : place + MAX_EMPTY_THINK_TOKENS]
        thought, closed, _ = str(case.job.tokenizer.decode(after.tolist())).partition(END_THINK)
        if closed and not thought.strip():
            return True
    return False


def nothing_or_all_learnt(case: Case) -> Trouble | None:
    """Q18: samples without a learnt token, or chat in which the user's words are learnt too."""
    nothing = [sample for sample in case.samples if not len(sample.supervised)]
    if nothing:
        return Trouble(
            "warning" if all(sample.is_ready_made for sample in nothing) else "error",
            f"{len(nothing):,} of {len(case.samples):,} samples looked at have no token that carries loss.",
            "at least one in each; the others cost time and teach nothing.",
            "leave out documents of a single token, and give an answer of each conversation a weight above 0.",
        )
    if case.run.loss_tokens == "all" or case.template is None:
        return None
    turn_end = case.template.end_of_turn_id
    whole = sum(bool(sample.weights.all() and (sample.ids == turn_end).sum() > 1) for sample in case.samples)
    if not whole:
        return None
    return Trouble(
        "warning",
        f"in {whole:,} of {len(case.samples):,} samples looked at, conversations by their {case.template.end_of_turn}, "
        "every token carries loss: the user's words are learnt as well.",
        "loss on the answers alone, as loss_tokens: assistant says.",
        "name the conversations as a source instead of a ready store of them, or set loss_tokens: all if you mean it.",
    )


RULES = (
    Rule[Case]("Q01", "pad-eq-eos", pad_equals_end, TriviumError),
    Rule[Case]("Q02", "eos-not-supervised", end_not_learnt, BadData),
    Rule[Case]("Q04", "base-chatml-frozen", untrained_and_frozen),
    Rule[Case]("Q05", "generation-eos", generation_never_ends),
    Rule[Case]("Q10", "vocab-shrink", fewer_rows),
    Rule[Case]("Q11", "token-id-range", foreign_tokenizer, BadData),
    Rule[Case]("Q13", "not-prefix", not_after_prompt, BadData),
    Rule[Case]("Q14", "think-empty-trained", empty_think_learnt),
    Rule[Case]("Q18", "all-masked", nothing_or_all_learnt, BadData),
)
