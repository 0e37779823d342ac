"""`trivium eval`: options and printing."""

import json
from pathlib import Path

import click

from trivium.config.inputs import Data

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
    from trivium.api import evaluate

    found = evaluate(
        model,
        held_out=held_out,
        prompts=prompts,
        answers=answers_file,
        lm_eval=tasks.split(",") if tasks is not None else (),
        seq_len=seq_len,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        nf4=nf4,
    )
    click.echo(json.dumps(found.figures, indent=1) if as_json else found)
