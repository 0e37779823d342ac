"""Evaluates one model: its loss on held-out data, its answers to prompts, and public benchmarks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trivium.errors import ConfigError
from trivium.files import atomic_write
from trivium.use import harness
from trivium.use.answers import EvalPrompt, ModelAnswer, Scores, answers, matches, read_questions, score
from trivium.use.compare import Bar, Note
from trivium.use.held_out import DEFAULT_SEQ_LEN, HeldOut, Passage, measure, passages_of_file, passages_of_run
from trivium.use.load import Loaded, load


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt, what was expected, and a model's answer.

    Attributes:
        messages: the prompt as chat messages.
        expected: the expected answer; may be None.
        text, reasoning, stopped, num_tokens: see `ModelAnswer`.
        is_exact: whether the answer equals the expected one; None without one.
    """

    messages: list[dict[str, Any]]
    expected: str | None
    text: str
    reasoning: str
    stopped: bool
    num_tokens: int
    is_exact: bool | None

    @classmethod
    def of(cls, question: EvalPrompt, answer: ModelAnswer) -> "AnsweredPrompt":
        """A prompt with its answer."""
        is_exact = matches(question, answer) if question.answer is not None else None
        return cls(messages=question.turns, expected=question.answer, **asdict(answer), is_exact=is_exact)


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The figures of a model; None for what was not asked for.

    Attributes:
        model: its name as given.
        held_out: the loss on held-out data.
        prompts: the scores of the answers.
        lm_eval: the metrics of each benchmark.
        answers: every prompt with its answer.
    """

    model: str
    held_out: HeldOut | None = None
    prompts: Scores | None = None
    lm_eval: dict[str, dict[str, float]] | None = None
    answers: list[AnsweredPrompt] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value is not None and name != "answers"}

    def __repr__(self) -> str:
        """The figures as lines of a label and a value."""
        return "\n".join(f"{label:<20} {value}" for label, value in _lines(self))


def evaluate(
    model: str,
    *,
    held_out: Path | None,
    prompts: Path | None,
    answers_file: Path | None,
    tasks: Sequence[str],
    seq_len: int = DEFAULT_SEQ_LEN,
    max_new_tokens: int = 256,
    thinking: bool = False,
    nf4: bool = False,
    note: Note = lambda text: None,
    bar: Bar = lambda name: lambda done, total: None,
) -> Evaluation:
    """Evaluate a model; by default, measure the loss of a run on its own held-out set.

    Args:
        model: a run folder, the folder of a model or an adapter, or a Hub id.
        held_out: a file to measure the loss on.
        prompts: a file of prompts, with or without expected answers.
        answers_file: where to write one JSON line per answer.
        tasks: names of benchmarks of lm-evaluation-harness.
        seq_len: sequence length for `held_out`.
        max_new_tokens: maximum tokens of an answer.
        thinking: the template's `enable_thinking`.
        nf4: quantize an adapter's base model to NF4.
        note: called with a remark for the reader.
        bar: starts a progress bar with a name, and returns what to call with (done, total).

    Raises: ConfigError or BadData when the model or a file cannot be used.
    """
    if answers_file is not None and prompts is None:
        raise ConfigError("--answers FILE stores the answers to --prompts FILE. Add --prompts FILE.")
    if tasks:
        harness.require_harness()
    questions = read_questions(prompts) if prompts is not None else []
    loaded = load(model, note, nf4=nf4)
    passages: list[Passage] = []
    if held_out is not None:
        passages = passages_of_file(held_out, loaded.tokenizer, seq_len, note)
    elif prompts is None and not tasks:
        passages = _own_passages(model, loaded, note)
    loss = measure(loaded, passages, bar("held-out loss")) if passages else None
    given: list[ModelAnswer] = []
    if questions:
        every = bar("answers")
        given = answers(loaded, questions, max_new_tokens=max_new_tokens, thinking=thinking, every=every)
    answered = [AnsweredPrompt.of(question, answer) for question, answer in zip(questions, given, strict=True)]
    if answers_file is not None:
        lines = (json.dumps(asdict(answer), ensure_ascii=False) for answer in answered)
        atomic_write(answers_file, "".join(line + "\n" for line in lines))
    return Evaluation(
        model=model,
        held_out=loss,
        prompts=score(questions, given) if questions else None,
        lm_eval=harness.run_tasks(loaded, list(tasks)) if tasks else None,
        answers=answered,
    )


def _own_passages(model: str, loaded: Loaded, note: Note) -> list[Passage]:
    """The held-out set of a run. Raises: ConfigError when the model is not a run."""
    if loaded.place.run_folder is None:
        raise ConfigError(f"{model} is not a run folder, so it has no held-out set. Add --held-out FILE.")
    return passages_of_run(loaded.place.run_folder, note)


def _lines(found: Evaluation) -> list[tuple[str, str]]:
    """Labels and values of the figures."""
    lines = []
    if found.held_out is not None:
        lines += [
            ("held-out loss", f"{found.held_out.loss:.4f} nats per token"),
            ("perplexity", f"{found.held_out.perplexity:,.3f}"),
            ("bits per byte", f"{found.held_out.bits_per_byte:.4f}"),
            ("supervised tokens", f"{found.held_out.num_tokens:,}"),
        ]
    if found.prompts is not None:
        scores = found.prompts
        lines.append(("prompts", f"{scores.num_questions:,}"))
        rates = {"exact match": scores.exact_match, "valid JSON": scores.json_valid, "stop rate": scores.stop_rate}
        lines += [(label, f"{rate:.1%}") for label, rate in rates.items() if rate is not None]
    for task, figures in (found.lm_eval or {}).items():
        lines += [(f"{task} {name.removesuffix(',none')}", f"{value:.4f}") for name, value in figures.items()]
    return lines
