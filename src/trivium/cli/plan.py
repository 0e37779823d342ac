"""`trivium plan`: choose a method, and predict memory, time and cost before renting or training.

Turns options into a `PlanRequest` and prints the answer. Imports torch only for --calibrate and for models that are not
in the catalog.
"""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trivium.config.inputs import parse_count
from trivium.config.run import METHOD_DEFAULTS
from trivium.errors import ConfigError

if TYPE_CHECKING:
    from trivium.config.inputs import Source
    from trivium.model.shape import QwenShape
    from trivium.plan.request import PlanRequest
    from trivium.plan.search import Plan
    from trivium.plan.workload import DataFacts

FILE = click.Path(path_type=Path)
MAX_AMOUNT = 1e18


class Amount(click.ParamType):
    """A number above zero, with an optional suffix as in run files: 0.5, 24, 10K, 1.5B."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).replace(",", "").replace("_", "")
        count = parse_count(text)
        try:
            number = float(text if isinstance(count, str) or not count else str(count))
        except ValueError:
            number = math.nan
        if not 0 < number <= MAX_AMOUNT:
            name = param.opts[0] if param else "A number"
            raise ConfigError(
                f"{name} is {value!r}; expected a number above zero and up to {MAX_AMOUNT:.0e}, for example 0.5 or 10K."
            )
        return number


AMOUNT = Amount()
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
@click.option("--rows", type=AMOUNT, help="Number of conversations or documents (5K), instead of files.")
@click.option("--tokens", type=AMOUNT, help="Number of tokens (1B), instead of files or with --rows.")
@click.option("--kind", type=click.Choice(["conversations", "documents"]), help="What --rows and --tokens count.")
@click.option("--device", help="Device to train on (l40s), or `any` for the best one to rent. Default: this machine.")
@click.option(
    "--devices",
    type=click.IntRange(1, 4096),
    metavar="NUMBER",
    help="Number of devices. Default: 1, or up to 8 for a rented GPU.",
)
@click.option("--memory", type=AMOUNT, help="Memory to use on each device, in GiB. Default: all of it.")
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
@click.option("--max-cost", type=AMOUNT, help="Maximum cost of the run in US dollars.")
@click.option("--max-hours", type=AMOUNT, help="Maximum length of the run in hours.")
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
        _plan(_request(words, run_file, **flags), run_file, as_json)


def _request(
    words: tuple[str, ...],
    run_file: Path | None,
    data: tuple[Path, ...],
    rows: float | None,
    tokens: float | None,
    kind: str | None,
    general: str | None,
    devices: int | None,
    memory: float | None,
    **flags: Any,
) -> "PlanRequest":
    """The request; the first word is the target unless it is an override."""
    from trivium.files import GIB
    from trivium.plan.request import PlanRequest

    has_target = bool(words) and "=" not in words[0]
    return PlanRequest(
        target=words[0] if has_target else None,
        overrides=words[1:] if has_target else words,
        sources=tuple(map(str, data)),
        facts=_given_facts(rows, tokens, kind, data),
        num_devices=devices,
        memory_bytes=None if memory is None else int(memory * GIB),
        is_general=None if general is None else general == "yes",
        name=run_file.stem if run_file else "plan",
        **flags,
    )


def _given_facts(rows: float | None, tokens: float | None, kind: Any, data: tuple[Path, ...]) -> "DataFacts | None":
    """The facts from --rows, --tokens and --kind; None without them."""
    from trivium.plan.workload import given_facts

    if rows is None and tokens is None:
        if kind is not None:
            raise ConfigError(
                f"--kind {kind} was given without an amount. Add --rows, --tokens or both; with --data, remove --kind."
            )
        return None
    if data or kind is None:
        given = "with --data" if data else "without --kind"
        raise ConfigError(
            f"Found --rows or --tokens {given}. Expected either --data FILE alone, or --rows or --tokens with --kind "
            "conversations or --kind documents."
        )
    return given_facts(kind, *(None if count is None else round(count) for count in (rows, tokens)))


def _plan(request: "PlanRequest", run_file: Path | None, as_json: bool) -> None:
    from trivium.plan.advice import advise, as_record, write_run
    from trivium.plan.request import resolve_request

    resolved = resolve_request(request, _survey, _read_hub)
    advice = advise(resolved.situation, resolved.decision, resolved.goal)
    if run_file and advice.plan:
        write_run(advice.plan, run_file, _notes(advice.plan))
        click.echo(f"wrote {run_file}", err=True)
    if as_json:
        click.echo(json.dumps(as_record(advice), indent=2))
        return
    from trivium.report.plan_page import print_page

    print_page(advice, _next_commands(advice.plan, request.target, run_file))


def _notes(plan: "Plan") -> list[str]:
    """Notes in the header of a written run file."""
    from trivium.plan.request import NO_DATA_YET

    is_placeholder = [source.path for source in plan.run.data.sources] == [NO_DATA_YET]
    return [f"{NO_DATA_YET} is a placeholder: replace it with the path of your data."] if is_placeholder else []


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


def _survey(sources: "Sequence[Source]") -> "DataFacts":
    """Facts about files, with estimated tokens, because counting them needs the tokenizer and torch."""
    from dataclasses import fields

    from trivium.data.look.survey import survey
    from trivium.plan.workload import DataFacts

    found = survey(sources)
    click.echo(f"data: {found.how}", err=True)
    return DataFacts(**{field.name: getattr(found, field.name) for field in fields(DataFacts)})


def _read_hub(name: str) -> "QwenShape":
    """The shape of a model on the Hub, without downloading its weights."""
    from trivium.model import hf

    return hf.read_shape(hf.find_folder(name, with_weights=False))


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
