"""The command `trivium`: finds the verb, and turns errors into messages and exit codes.

Verbs are imported only when they run, so that `trivium --help` is instant. Data goes to stdout, everything else to
stderr.
"""

import difflib
import importlib
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from typing import Any

import click

from trivium.errors import TriviumError

VERBS = {
    "quickstart": "Train small models on this machine with every method and compare them, in minutes.",
    "plan": "Plan a training run: method, memory, time and cost.",
    "train": "Train a run file; run the same command again to resume.",
    "doctor": "Find what would make a run fail, or silently learn the wrong thing.",
    "data": "Inspect data, build and import token stores.",
    "tokenizer": "Train and inspect tokenizers.",
    "model": "List model sizes, and find one for a parameter count.",
    "config": "Show, explain and check run files.",
    "chat": "Chat with a model, or complete a text.",
    "eval": "Evaluate a model on held-out data, prompts or benchmarks.",
    "compare": "Compare runs and their base models: quality and cost.",
    "export": "Export a model or adapter, merged or not, and verify it.",
    "verify": "Verify that a run skipped and repeated no sample.",
    "report": "Write report.html for a run, finished or not.",
}
"""Each verb's help; the verb itself is the click command of the same name in trivium/cli/VERB.py."""

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130
MAX_COLUMNS = 100


class VerbGroup(click.Group):
    """A click group whose commands are imported when they are invoked, and whose errors are paragraphs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return getattr(importlib.import_module(f"trivium.cli.{cmd_name}"), cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(VERBS)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. Click itself handles usage errors (2) and broken pipes (1, silently)."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            if isinstance(error, TriviumError):
                print_paragraphs(str(error))
                ctx.exit(error.exit_code)
            print_paragraphs(describe_fault(error, sys.argv[1:]))
            ctx.exit(EXIT_FAULT)


def describe_fault(error: Exception, arguments: list[str]) -> str:
    """One paragraph about an unexpected error."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    command = shlex.join(["trivium", "--debug", *arguments])
    return f"unexpected error, {what}. For the traceback, run: {command}"


def print_paragraphs(message: str) -> None:
    """Print each line of a message to stderr; wrapped on a terminal, one line each otherwise."""
    for line in message.splitlines():
        paragraph = f"trivium: {line}"
        if sys.stderr.isatty():
            columns = min(shutil.get_terminal_size().columns, MAX_COLUMNS)
            paragraph = textwrap.fill(paragraph, columns, break_long_words=False, break_on_hyphens=False)
        click.echo(paragraph, err=True)


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_COLUMNS})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="trivium", message="trivium %(version)s")
def trivium(debug: bool) -> None:
    """Train Qwen language models: LoRA, QLoRA, full fine-tuning, continued pre-training, or from scratch.

    Start with `trivium quickstart`. Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 does not fit,
    4 bad data, 75 stopped and saved (run again).
    """


def main() -> None:
    """Entry point of the `trivium` command."""
    # Spinning threads slow training twentyfold when another process needs a core; yielding after a short spin costs a
    # few percent on an idle machine. Read by libgomp when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    trivium(prog_name="trivium")
