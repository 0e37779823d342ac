"""`trivium chat`: talk to a model, or give it the beginning of a text and read how it goes on.

Reads lines, prints pieces, obeys commands; the talking is `trivium.use.chat`. What the model writes goes to stdout,
everything else to stderr.
"""

import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.errors import ConfigError, TriviumError

if TYPE_CHECKING:
    from trivium.use.chat import Dialogue, Writer

COMMANDS = {
    "/retry": "another answer to the last question",
    "/system TEXT": "a new system prompt; without TEXT none",
    "/think": "turn reasoning on or off, where the template has the switch",
    "/clear": "begin anew, with the same system prompt",
    "/save FILE.jsonl": "append the conversation to FILE, as a row that trains as it is",
    "/help": "these commands",
    "/quit": "end, as Ctrl-D does",
}
TEXT_TOKENS, ANSWER_TOKENS = 200, 2048


@click.command()
@click.argument("model")
@click.option("-p", "--prompt", help="ModelAnswer or continue this and end; without it, ask line by line.")
@click.option("--chat", "mode", flag_value="chat", help="Converse, whatever the model was made for.")
@click.option("--complete", "mode", flag_value="complete", help="Go on with a text, whatever the model was made for.")
@click.option("--system", default="", help="The system prompt of a conversation.")
@click.option(
    "--thinking/--no-thinking", default=None, help="Ask for reasoning or none. Default: as the template does."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help=f"Where to stop. Default: {TEXT_TOKENS} of a text, {ANSWER_TOKENS} of an answer.",
)
@click.option(
    "--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0.0), help="0 takes the likeliest token."
)
@click.option("--seed", type=int, help="Make the choice of tokens repeatable.")
@click.option("--nf4", is_flag=True, help="Hold an adapter's base in NF4, as QLoRA trained it.")
def chat(
    model: str,
    prompt: str | None,
    mode: str | None,
    system: str,
    thinking: bool | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    nf4: bool,
) -> None:
    """Talk to MODEL: a run folder, the folder of a model or an adapter, or a Hub id.

    A model that was made for conversations converses: it has a chat template and stops at the end of a turn. Any other
    goes on with a text, and so does every model with a prompt on stdin. --chat and --complete choose otherwise.

    \b
    Examples:
      trivium chat runs/tuned --system "ModelAnswer in one sentence."
      trivium chat runs/quickstart -p "Once upon a time" --temperature 0
    """
    if prompt is None and mode != "chat" and not sys.stdin.isatty():
        prompt, mode = sys.stdin.read().rstrip("\n"), "complete"
    if prompt is not None and not prompt:
        raise click.UsageError("The prompt is empty; a model needs at least one token to go on from.")
    import torch

    from trivium.use.chat import Dialogue, Writer
    from trivium.use.load import load

    loaded = load(model, lambda text: click.echo(text, err=True), nf4=nf4)
    converses = mode == "chat" or (mode is None and loaded.converses)
    if converses and loaded.template is None:
        raise ConfigError(f"The tokenizer of {model} has no chat template to converse in. Leave out --chat.")
    if not converses and (system or thinking is not None):
        raise ConfigError(f"{model} goes on with a text; --system and --thinking are for conversations. Add --chat.")
    if seed is not None:
        torch.manual_seed(seed)
    writer = Writer(loaded, max_new_tokens or (ANSWER_TOKENS if converses else TEXT_TOKENS), temperature)
    dialogue = Dialogue(writer, system, thinking)
    if prompt is not None and converses:
        _answer(dialogue, dialogue.say(prompt))
    elif prompt is not None:
        _complete(writer, prompt)
    elif converses:
        _converse(dialogue, model)
    else:
        _continue_texts(writer)


def _continue_texts(writer: "Writer") -> None:
    """Go on with one line after the other until an empty one."""
    click.echo("Give the beginning of a text; an empty line ends. Ctrl-C stops a completion.", err=True)
    with suppress(EOFError, KeyboardInterrupt):
        while line := _ask():
            _complete(writer, line)


def _complete(writer: "Writer", prompt: str) -> None:
    click.echo(prompt, nl=False)
    _show(writer.write(prompt))


def _converse(dialogue: "Dialogue", name: str) -> None:
    """ModelAnswer and obey line after line until /quit or the end of the input."""
    click.echo(f"Talking with {name}. /help lists the commands; Ctrl-C stops an answer, /quit ends.", err=True)
    with suppress(EOFError):
        while True:
            try:
                line = _ask().strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    _obey(dialogue, line)
                elif line:
                    _answer(dialogue, dialogue.say(line))
            except KeyboardInterrupt:
                click.echo("\n/quit ends.", err=True)
            except (TriviumError, OSError) as error:
                click.echo(str(error), err=True)


def _ask() -> str:
    """A line from the user. The prompt is for people; lines can be edited where the terminal can."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):
        import readline  # noqa: F401
    return input("> ")


def _obey(dialogue: "Dialogue", line: str) -> None:
    """Do what a command says.

    Raises: TriviumError or OSError when it cannot be done.
    """
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    if verb == "/retry":
        _answer(dialogue, dialogue.retry())
    elif verb == "/system":
        dialogue.system = rest
        _say(f"system prompt: {rest}" if rest else "no system prompt")
    elif verb == "/think":
        template = dialogue.writer.loaded.template
        if template is None or not template.has_thinking_switch:
            raise ConfigError("This model's template has no switch for reasoning.")
        dialogue.thinking = dialogue.thinking is False
        _say(f"reasoning is {'on' if dialogue.thinking else 'off'}")
    elif verb == "/clear":
        dialogue.turns.clear()
        _say("begun anew")
    elif verb == "/save" and rest:
        dialogue.save(Path(rest).expanduser())
        _say(f"appended to {rest}")
    elif verb == "/help":
        _say("\n".join(f"{command:<18}{words}" for command, words in COMMANDS.items()))
    else:
        _say(f"{line} is no command; /help lists them.")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _answer(dialogue: "Dialogue", pieces: Generator[str]) -> None:
    """Print an answer, and say where it is not whole."""
    if _show(pieces) and not dialogue.writer.is_whole:
        _say(f"cut off after {dialogue.writer.max_new_tokens:,} tokens; --max-new-tokens allows more")


def _show(pieces: Generator[str]) -> bool:
    """Print what a model writes as it comes, its reasoning dim; False where Ctrl-C stopped it."""
    written = ""
    with closing(pieces):
        try:
            for piece in pieces:
                written += piece
                thinks = "<think>" in written and "</think>" not in written
                click.echo(click.style(piece, dim=True) if thinks else piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo()
            _say("stopped")
            return False
    click.echo()
    return True
