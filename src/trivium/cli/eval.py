"""`trivium eval`: options and printing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivium.cli.progress import waiting
from trivium.config.inputs import Data
from trivium.errors import ConfigError

if TYPE_CHECKING:
    from trivium.use.answers import EvalPrompt, ModelAnswer

FILE = click.Path(path_type=Path)
SEQ_LEN: int = Data.model_fields["seq_len"].default


@click.command()
@click.argument("model")
@click.option("--held-out", type=FILE, help="Measure the loss on this file of documents or conversations.")
@click.option("--prompts", type=FILE, help="Answer these prompts; score exact match, valid JSON and stop rate.")
@click.option("--answers", "answers_file", type=FILE, help="Write every answer to this .jsonl file.")
@click.option("--lm-eval", "tasks", help="Run these tasks of lm-evaluation-harness (comma-separated).")
@click.option(
    "--seq-len", type=click.IntRange(8), default=SEQ_LEN, show_default=True, help="Sequence length for --held-out."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Maximum tokens of an answer."
)
@click.option("--thinking/--no-thinking", default=False, help="Turn reasoning on, if the template has the switch.")
@click.option("--nf4", is_flag=True, help="Quantize the adapter's base model to NF4, as QLoRA training does.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def eval(
    model: str,
    held_out: Path | None,
    prompts: Path | None,
    answers_file: Path | None,
    tasks: str | None,
    seq_len: int,
    max_new_tokens: int,
    thinking: bool,
    nf4: bool,
    as_json: bool,
) -> None:
    """Evaluate MODEL: a run folder, the folder of a model or an adapter, or a Hub id.

    By default, measures the loss of a run on its own held-out set. --held-out, --prompts and --lm-eval replace that
    and can be combined. Prompts are JSON lines, {"prompt": ..., "answer": ...} or {"messages": [...]}; they are
    answered with greedy decoding.

    \b
    Examples:
      trivium eval runs/tuned
      trivium eval runs/tuned --prompts questions.jsonl --answers answers.jsonl
      trivium eval Qwen/Qwen3-0.6B --held-out stories.jsonl --json
    """
    if answers_file is not None and prompts is None:
        raise click.UsageError("--answers FILE stores the answers to --prompts FILE. Add --prompts FILE.")
    from trivium.use import harness
    from trivium.use.answers import answers, read_questions, score
    from trivium.use.held_out import measure, passages_of_file, passages_of_run
    from trivium.use.load import load

    if tasks is not None:
        harness.require_harness()
    questions = read_questions(prompts) if prompts is not None else []
    found: dict[str, Any] = {"model": model}
    with waiting() as wait:
        loaded = load(model, wait.note, nf4=nf4)
        passages = []
        if held_out is not None:
            passages = passages_of_file(held_out, loaded.tokenizer, seq_len, wait.note)
        elif prompts is None and tasks is None:
            if loaded.place.run_folder is None:
                raise ConfigError(f"{model} is not a run folder, so it has no held-out set. Add --held-out FILE.")
            passages = passages_of_run(loaded.place.run_folder, wait.note)
        if passages:
            found["held_out"] = asdict(measure(loaded, passages, wait.bar("held-out loss")))
        if questions:
            given = answers(
                loaded, questions, max_new_tokens=max_new_tokens, thinking=thinking, every=wait.bar("answers")
            )
            found["prompts"] = asdict(score(questions, given))
            if answers_file is not None:
                write_answers(answers_file, questions, given)
        if tasks is not None:
            found["lm_eval"] = harness.run_tasks(loaded, [task.strip() for task in tasks.split(",")])
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, value in _lines(found):
        click.echo(f"{name:<20} {value}")


def write_answers(path: Path, questions: "list[EvalPrompt]", given: "list[ModelAnswer]") -> None:
    """Write one JSON line per answer: prompt, expected answer, answer."""
    from trivium.files import atomic_write
    from trivium.use.answers import matches

    lines = [
        json.dumps(
            {
                "messages": question.turns,
                "expected": question.answer,
                **asdict(answer),
                "is_exact": matches(question, answer) if question.answer is not None else None,
            },
            ensure_ascii=False,
        )
        for question, answer in zip(questions, given, strict=True)
    ]
    atomic_write(path, "".join(line + "\n" for line in lines))


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of the results."""
    lines = []
    if "held_out" in found:
        held_out = found["held_out"]
        lines += [
            ("held-out loss", f"{held_out['loss']:.4f} nats per token"),
            ("perplexity", f"{held_out['perplexity']:,.3f}"),
            ("bits per byte", f"{held_out['bits_per_byte']:.4f}"),
            ("supervised tokens", f"{held_out['num_tokens']:,}"),
        ]
    if "prompts" in found:
        scores = found["prompts"]
        lines.append(("prompts", f"{scores['num_questions']:,}"))
        for key, label in (("exact_match", "exact match"), ("json_valid", "valid JSON"), ("stop_rate", "stop rate")):
            if scores[key] is not None:
                lines.append((label, f"{scores[key]:.1%}"))
    for task, figures in found.get("lm_eval", {}).items():
        lines += [(f"{task} {name.removesuffix(',none')}", f"{value:.4f}") for name, value in figures.items()]
    return lines
