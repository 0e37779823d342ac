"""The doctor: checks all rules in three rounds. A round with errors is the last one.

    round              checks                                                     runs
    the run alone      installed packages, write permission, the named model      before preparation
    the prepared run   tokens, data, hyperparameters, memory, disk                with tokenizer and token stores
    the loaded run     one forward and backward pass                              with the model loaded

`trivium doctor` runs all three. `trivium train` runs the first two, which take a fraction of a second: they read a
limited number of samples and only a few embedding rows of the model's weights. Prints nothing.
"""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path

from trivium.config.run import Run
from trivium.doctor import adapter, data, machine, numbers, step, tokens
from trivium.doctor.findings import Finding, check, refusal, stopping
from trivium.doctor.prepared import load, prepare_checks
from trivium.engine.device import Machine, probe
from trivium.engine.prepare import Job, prepare
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError

RUN_RULES = (*machine.RUN_RULES, *adapter.RULES)
PREPARED_RULES = (*tokens.RULES, *data.RULES, *numbers.RULES, *machine.RULES)
LOADED_RULES = step.RULES
IDS = frozenset(rule.id for rules in (RUN_RULES, PREPARED_RULES, LOADED_RULES) for rule in rules)


def allowed_ids(given: tuple[str, ...]) -> frozenset[str]:
    """The rule ids given with `--allow`, in capitals.

    Raises: ConfigError that suggests the nearest id for an unknown one.
    """
    for name in given:
        if name.upper() not in IDS:
            near = difflib.get_close_matches(name.upper(), sorted(IDS), n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else f"The rules are {', '.join(sorted(IDS))}."
            raise ConfigError(f"--allow {name}: the doctor has no such rule. {hint}")
    return frozenset(name.upper() for name in given)


def examine(run: Run, allowed: frozenset[str], note: Callable[[str], None]) -> Iterator[Finding]:
    """Yield every finding; stop after the first round with an error that is not allowed.

    Raises: ConfigError or BadData when the run cannot be prepared.
    """
    found = check(RUN_RULES, run)
    yield from found
    if stopping(found, allowed):
        return
    the_machine = probe(run.device, run.precision)
    job = prepare(run, note, the_machine)
    for built in job.built:
        built.verify()
    prepared = prepare_checks(job, the_machine, with_hub=True)
    found = check(PREPARED_RULES, prepared)
    yield from found
    if stopping(found, allowed):
        return
    note("running one forward and backward pass")
    yield from check(LOADED_RULES, load(prepared))


def require_startable(run: Run, allowed: frozenset[str]) -> list[Finding]:
    """The warnings and allowed errors of the first round. A finished run is not checked again.

    Raises: TriviumError with all findings that stop the run.
    """
    is_finished = RunFolder(Path(run.runs_dir) / run.name).is_finished
    return [] if is_finished else _require_none_stop(check(RUN_RULES, run), allowed)


def require_sound(job: Job, the_machine: Machine, allowed: frozenset[str]) -> list[Finding]:
    """The warnings and allowed errors of the second round.

    Raises: TriviumError with all findings that stop the run.
    """
    return _require_none_stop(check(PREPARED_RULES, prepare_checks(job, the_machine, with_hub=False)), allowed)


def _require_none_stop(found: list[Finding], allowed: frozenset[str]) -> list[Finding]:
    if errors := stopping(found, allowed):
        raise refusal(errors, with_paragraphs=True)
    return found
