"""The command `trivium`: finds the verb, and turns errors into messages and exit codes.

A verb is imported only when it runs, so that `trivium --help` is fast. Data goes to stdout, everything else to stderr.
"""

import difflib
import importlib
import shlex
import shutil
import sys
import textwrap
import traceback
from typing import Any

import click

from trivium.errors import TriviumError, printable
from trivium.files import full_disk_explained

VERBS = {
    "quickstart": "Train small models with every method and compare them, in minutes.",
    "demo": "Teach a real chat model a format and a persona, in minutes.",
    "plan": "Plan a training run: method, memory, time and cost.",
    "train": "Train a run file; run the same command again to resume.",
    "doctor": "Check a run file for mistakes before training.",
    "data": "Inspect data; build and import token stores.",
    "tokenizer": "Train and inspect tokenizers.",
    "model": "List model sizes, and find one for a parameter count.",
    "config": "Show, explain and check run files.",
    "chat": "Chat with a model, or complete a text.",
    "eval": "Evaluate a model on held-out data, prompts or benchmarks.",
    "compare": "Compare runs and their base models: quality and cost.",
    "export": "Export a model or adapter, optionally merged, and verify it.",
    "verify": "Verify that a run read every sample exactly once and in order.",
    "report": "Write report.html for a run, finished or not.",
}
"""The help line of each verb; its click command is in trivium/cli/VERB.py."""

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130
MAX_COLUMNS = 100


class VerbGroup(click.Group):
    """Imports a command when it is invoked, and prints errors as paragraphs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return getattr(importlib.import_module(f"trivium.cli.{cmd_name}"), cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(VERBS)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. Click handles usage errors (exit code 2) and broken pipes (1, silently)."""
        try:
            with full_disk_explained(None, "Files that were whole before are unchanged."):
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
            what = " ".join(f"{type(error).__name__}: {error}".split())
            command = shlex.join(["trivium", "--debug", *sys.argv[1:]])
            print_paragraphs(f"unexpected error: {what}. For the traceback, run: {command}")
            ctx.exit(EXIT_FAULT)


def print_paragraphs(message: str) -> None:
    """Print each line of a message to stderr, wrapped if stderr is a terminal."""
    for line in printable(message).splitlines():
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

    Start with `trivium quickstart`. Exit codes: 0 done, 1 failed, 2 usage or configuration error, 3 not enough memory
    or disk, 4 bad data, 75 stopped and saved (run the same command again).
    """


def main() -> None:
    """Entry point of the `trivium` command."""
    trivium(prog_name="trivium")
