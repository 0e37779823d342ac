"""`trivium chat`: chat with a model, or complete a text. Model output goes to stdout, everything else to stderr."""

import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.errors import ConfigError, TriviumError, count_of, printable

if TYPE_CHECKING:
    from trivium.use.chat import Dialogue, Writer

COMMANDS = {
    "/retry": "answer the last question again",
    "/system TEXT": "set the system prompt; without TEXT, remove it",
    "/think": "turn reasoning on or off, if the template has the switch",
    "/clear": "start a new conversation with the same system prompt",
    "/save FILE.jsonl": "append the conversation to FILE as a training record",
    "/help": "list the commands",
    "/quit": "quit, like Ctrl-D",
}
TEXT_TOKENS, ANSWER_TOKENS = 200, 2048


@click.command()
@click.argument("model")
@click.option("-p", "--prompt", help="Answer or complete this and exit. Default: read prompts line by line.")
@click.option("--chat", "mode", flag_value="chat", help="Chat even if MODEL is not a chat model.")
@click.option("--complete", "mode", flag_value="complete", help="Complete text even if MODEL is a chat model.")
@click.option("--system", default="", help="System prompt of the conversation.")
@click.option("--thinking/--no-thinking", default=None, help="Turn reasoning on or off. Default: the template's.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help=f"Maximum tokens to generate. Default: {TEXT_TOKENS} for a text, {ANSWER_TOKENS} for an answer.",
)
@click.option(
    "--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0.0), help="0 means greedy decoding."
)
@click.option("--seed", type=int, help="Make sampling reproducible.")
@click.option("--nf4", is_flag=True, help="Quantize the adapter's base model to NF4, as QLoRA training does.")
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
    """Chat with MODEL: a run folder, the folder of a model or an adapter, or a Hub id.

    A chat model (one that has a chat template and stops at the end of a turn) answers messages; any other model
    completes text. What is piped in is one message or text. --complete overrides this, and so does --chat, with which
    every line that is piped in is a message.

    \b
    Examples:
      trivium chat runs/tuned --system "Answer in one sentence."
      trivium chat runs/quickstart -p "Once upon a time" --temperature 0
    """
    is_piped = prompt is None and mode != "chat" and not sys.stdin.isatty()
    if is_piped:
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt:
        raise click.UsageError("The prompt is empty. Give at least one character.")
    import torch

    from trivium.use.chat import Dialogue, Writer
    from trivium.use.load import load

    loaded = load(model, _note, nf4=nf4)
    converses = mode == "chat" or (mode is None and loaded.converses)
    if converses and loaded.template is None:
        raise ConfigError(f"The tokenizer of {model} has no usable chat template. Remove --chat.")
    if not converses and (system or thinking is not None):
        raise ConfigError(f"--system and --thinking only work in a chat, and {model} completes text. Add --chat.")
    if is_piped:
        _note(_what_happens(model, mode, converses))
    if seed is not None:
        torch.manual_seed(seed)
    writer = Writer(loaded, max_new_tokens or (ANSWER_TOKENS if converses else TEXT_TOKENS), temperature)
    dialogue = Dialogue(writer, system, thinking)
    if prompt is not None and converses:
        _answer(dialogue, dialogue.say(prompt))
    elif prompt is not None:
        click.echo(prompt, nl=False)
        _show(writer.write(prompt))
    elif converses:
        _converse(dialogue, model)
    else:
        _continue_texts(writer)


def _note(text: str) -> None:
    click.echo(printable(text), err=True)


def _what_happens(model: str, mode: str | None, converses: bool) -> str:
    """What is done with a piped text and why, in one line."""
    if mode is not None:
        return "continuing the text on stdin"
    if converses:
        return f"answering the text on stdin as a message, because {model} is a chat model; --complete continues it"
    return f"continuing the text on stdin, because {model} is not a chat model"


def _continue_texts(writer: "Writer") -> None:
    """Complete each line until an empty one."""
    _note("Type the beginning of a text. Ctrl-C stops a completion; an empty line quits.")
    with suppress(EOFError, KeyboardInterrupt):
        while line := _ask():
            click.echo(line, nl=False)
            _show(writer.write(line))


def _converse(dialogue: "Dialogue", name: str) -> None:
    """Answer messages and run commands until /quit or the end of the input."""
    _note(f"Chatting with {name}. /help lists the commands; Ctrl-C stops an answer, /quit quits.")
    with suppress(EOFError):
        while True:
            try:
                line = _ask().strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    _run_command(dialogue, line)
                elif line:
                    _answer(dialogue, dialogue.say(line))
            except KeyboardInterrupt:
                _note("\nType /quit to quit.")
            except (TriviumError, OSError) as error:
                _note(str(error))


def _ask() -> str:
    """A line from the user, with a prompt and line editing on a terminal."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):
        import readline  # noqa: F401
    return input("> ")


def _run_command(dialogue: "Dialogue", line: str) -> None:
    """Run one line that starts with a slash."""
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    if verb == "/retry":
        _answer(dialogue, dialogue.retry())
    elif verb == "/system":
        dialogue.system = rest
        _note(f"system prompt: {rest}" if rest else "no system prompt")
    elif verb == "/think":
        template = dialogue.writer.loaded.template
        if template is None or not template.has_thinking_switch:
            raise ConfigError("The chat template of this model has no thinking switch.")
        dialogue.thinking = dialogue.thinking is False
        _note(f"reasoning is {'on' if dialogue.thinking else 'off'}")
    elif verb == "/clear":
        dialogue.turns.clear()
        _note("new conversation")
    elif verb == "/save" and rest:
        dialogue.save(Path(rest).expanduser())
        _note(f"appended to {rest}")
    elif verb == "/help":
        _note("\n".join(f"{command:<18}{words}" for command, words in COMMANDS.items()))
    else:
        _note(f"{line} is not a command; /help lists the commands.")


def _answer(dialogue: "Dialogue", pieces: Generator[str]) -> None:
    """Print an answer, with a note if it was cut off."""
    if _show(pieces) and not dialogue.writer.is_whole:
        _note(f"cut off after {count_of(dialogue.writer.max_new_tokens, 'token')}; raise --max-new-tokens for more")


def _show(pieces: Generator[str]) -> bool:
    """Stream model output, with dim reasoning. Returns False if Ctrl-C stopped it."""
    written = ""
    with closing(pieces):
        try:
            for piece in pieces:
                written += piece
                thinks = "<think>" in written and "</think>" not in written
                shown = printable(piece)
                click.echo(click.style(shown, dim=True) if thinks else shown, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo()
            _note("stopped")
            return False
    click.echo()
    return True
