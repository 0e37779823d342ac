"""`trivium plan`: choose a method, and predict memory, time and cost before renting or training.

Prints what `trivium.plan` answers. Imports torch only for --calibrate and for models that are not in the catalog, and
transformers only to count tokens.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivium.config.run import METHOD_DEFAULTS
from trivium.errors import ConfigError

if TYPE_CHECKING:
    from trivium.plan.search import Plan

FILE = click.Path(path_type=Path)


GROUPS = {
    "Data": ("data", "rows", "tokens", "kind"),
    "Hardware": ("device", "devices", "memory"),
    "Goal": ("method", "prefer", "max_cost", "max_hours", "adapter_only", "general"),
    "Output": ("run_file", "as_json"),
    "Instead of a plan": ("calibrate", "is_check"),
}
"""Groups of options in `--help`."""


class GroupedCommand(click.Command):
    """A command with grouped options in its help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in GROUPS.items():
            records = [param.get_help_record(ctx) for param in self.params if param.name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])


@click.command(cls=GroupedCommand)
@click.argument("words", nargs=-1, metavar="[RUN_FILE_OR_MODEL] [KEY=VALUE]...")
@click.option("--data", type=FILE, multiple=True, help="A file or folder of training data; may be repeated.")
@click.option("--rows", metavar="NUMBER", help="Number of conversations or documents (5K), instead of files.")
@click.option("--tokens", metavar="NUMBER", help="Number of tokens (1B), instead of files or with --rows.")
@click.option("--kind", type=click.Choice(["conversations", "documents"]), help="What --rows and --tokens count.")
@click.option("--device", help="Device to train on (l40s), or `any` for the best one to rent. Default: this machine.")
@click.option(
    "--devices",
    type=click.IntRange(1, 4096),
    metavar="NUMBER",
    help="Number of devices. Default: 1, or up to 8 for a rented GPU.",
)
@click.option("--memory", metavar="NUMBER", help="Memory to use on each device, in GiB. Default: all of it.")
@click.option(
    "--method", type=click.Choice(list(METHOD_DEFAULTS)), help="Training method. Default: chosen to suit the data."
)
@click.option(
    "--prefer",
    type=click.Choice(["cheapest", "fastest"]),
    default="cheapest",
    show_default=True,
    help="What to optimize.",
)
@click.option("--max-cost", metavar="NUMBER", help="Maximum cost of the run in US dollars.")
@click.option("--max-hours", metavar="NUMBER", help="Maximum length of the run in hours.")
@click.option("--adapter-only", is_flag=True, help="The model's license lets you publish only an adapter.")
@click.option(
    "--general", type=click.Choice(["yes", "no"]), help="Whether an existing model already does the task well enough."
)
@click.option("--write", "run_file", type=FILE, help="Write the plan as a run file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--calibrate", is_flag=True, help="Measure this machine once (minutes); later plans use it.")
@click.option(
    "--check", "is_check", is_flag=True, help="Compare predictions with measurements for the given run folders."
)
def plan(
    words: tuple[str, ...],
    run_file: Path | None,
    as_json: bool,
    calibrate: bool,
    is_check: bool,
    **flags: Any,
) -> None:
    """Plan a training run: method, memory, time and cost.

    Plans a RUN_FILE or a MODEL (a name, a folder, or a size like 25M); with data alone, it also chooses the model. Keys
    that you set are kept; all others are searched. Exit codes: 0 a plan, or the advice not to train; 2 usage or
    configuration error; 3 nothing fits (lists the cheapest changes that would fit).

    \b
    Examples:
      trivium plan lora.yaml
      trivium plan Qwen/Qwen3-8B --rows 5K --kind conversations --device any --write plan.yaml
      trivium plan 25M --tokens 500M --kind documents
      trivium plan --check runs/one runs/two
    """
    if calibrate:
        _calibrate()
    elif is_check:
        _check([Path(word) for word in words], as_json)
    else:
        _plan(words, run_file, as_json, **flags)


def _plan(
    words: tuple[str, ...], run_file: Path | None, as_json: bool, general: str | None, data: Any, **flags: Any
) -> None:
    """Plan and print; the first word is the target unless it is an override."""
    from trivium.api import plan as plan_run

    target, overrides = (words[0], words[1:]) if words and "=" not in words[0] else (None, words)
    is_general = None if general is None else general == "yes"
    planned = plan_run(target, *overrides, general=is_general, data=list(data) or None, write=run_file, **flags)
    if run_file and planned.plan:
        click.echo(f"wrote {run_file}", err=True)
    if as_json:
        click.echo(json.dumps(planned.record, indent=2))
        return
    from trivium.report.plan_page import print_page

    print_page(planned.advice, _next_commands(planned.plan, target, run_file))


def _next_commands(plan: "Plan | None", target: str | None, run_file: Path | None) -> list[str]:
    """Commands to run next."""
    again = shlex.join(["trivium", *sys.argv[1:]])
    if plan is None:
        return [f"{again} --method lora"] if target else []
    if run_file:
        commands = [f"trivium doctor {run_file}", f"trivium train {run_file}"]
    else:
        commands = [f"{again} --write plan.yaml"]
    is_guess = plan.device.name == "this-cpu" and plan.speed.high > 1.5 * plan.speed.seconds_per_step
    return [*commands, *(["trivium plan --calibrate"] if is_guess else [])]


def _calibrate() -> None:
    """Measure this machine and save the calibration."""
    from trivium.measure.calibrate import calibrate
    from trivium.plan import calibration

    measured = calibrate(lambda text: click.echo(text, err=True))
    for dtype, error in measured.error.items():
        click.echo(f"{dtype}: the fit is within {error:.0%} of the measured time of every step", err=True)
    click.echo(f"wrote {calibration.save(measured)}", err=True)


def _check(folders: list[Path], as_json: bool) -> None:
    """Print how far the predictions for these runs were off."""
    from trivium.plan import check

    if not folders:
        raise ConfigError("--check needs run folders, for example: trivium plan --check runs/lora.")
    outcomes = check.check(folders)
    click.echo(json.dumps(check.as_json(outcomes), indent=2) if as_json else check.as_table(outcomes))
