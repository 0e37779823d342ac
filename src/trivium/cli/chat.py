"""`trivium chat`: give a model the beginning of a text and read how it goes on."""

import sys
from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Complete this text and end; without it, ask line by line.")
@click.option("--max-new-tokens", default=200, show_default=True, type=click.IntRange(min=1), help="Where to stop.")
@click.option(
    "--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0.0), help="0 takes the likeliest token."
)
@click.option("--seed", type=int, help="Make the choice of tokens repeatable.")
def chat(model: Path, prompt: str | None, max_new_tokens: int, temperature: float, seed: int | None) -> None:
    """Complete text with MODEL: a run folder, or any Hugging Face folder of a Qwen model.

    \b
    Examples:
      trivium chat runs/quickstart
      trivium chat runs/quickstart -p "Once upon a time" --temperature 0
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt:
        raise click.UsageError("The prompt is empty; a model needs at least one token to go on from.")

    from trivium.use.chat import Completer

    completer = Completer(model, seed)
    if prompt is not None:
        _print_completion(completer, prompt, max_new_tokens, temperature)
        return
    click.echo("Give the beginning of a text; an empty line ends. Ctrl-C stops a completion.", err=True)
    while line := _ask():
        try:
            _print_completion(completer, line, max_new_tokens, temperature)
        except KeyboardInterrupt:
            click.echo()


def _ask() -> str:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return ""


def _print_completion(completer: object, prompt: str, max_new_tokens: int, temperature: float) -> None:
    from trivium.use.chat import Completer

    assert isinstance(completer, Completer)
    click.echo(prompt, nl=False)
    for piece in completer.complete(prompt, max_new_tokens, temperature):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
