"""The doctor: every rule put to a run, in rounds, each of which presumes that the last one found no error.

    the run alone      what is installed, writable, and named as the model        before anything is prepared
    the case           tokens, data, numbers, memory, disk                        once tokenizer and stores are there
    the trial          the engine's state, then a step, then what it promises     with the model loaded

`trivium doctor` asks all. The start of `trivium train` asks the first two: beside the preparation that training
needs anyway they take a fraction of a second, since they read a bounded number of samples and rows and no weights but
a few rows of the embedding. Prints nothing. Imported by the command line.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trivium.config.run import Run
from trivium.doctor import adapter, data, machine, numbers, tokens, trial
from trivium.doctor.case import Case, Trial, build_trial, read_conversations
from trivium.doctor.findings import Finding, known_ids, look, refusal, stopping
from trivium.engine.device import Machine, probe
from trivium.engine.prepare import Job, prepare
from trivium.engine.runfolder import RunFolder

RUN_RULES = (*machine.RUN_RULES, *adapter.RUN_RULES)
CASE_RULES = (*tokens.RULES, *data.RULES, *numbers.RULES, *machine.RULES)
TRIAL_ROUNDS = ((*adapter.TRIAL_RULES, *trial.STATE_RULES), trial.STEP_RULES, trial.PROMISE_RULES)
IDS = frozenset(rule.id for rules in (RUN_RULES, CASE_RULES, *TRIAL_ROUNDS) for rule in rules)


def allowed_ids(given: tuple[str, ...]) -> frozenset[str]:
    """The ids that `--allow` names.

    Raises: ConfigError for one that no rule has.
    """
    return known_ids(given, IDS)


def examine(run: Run, allowed: frozenset[str], note: Callable[[str], None]) -> Iterator[Finding]:
    """Everything the doctor finds; goes no further than the round in which an error was found that nobody allowed.

    Raises: ConfigError or BadData when the run cannot even be prepared.
    """
    found = look(RUN_RULES, run)
    yield from found
    if stopping(found, allowed):
        return
    the_machine = probe(run.device, run.precision)
    job = prepare(run, note, the_machine)
    for built in job.built:
        built.verify()
    case = Case(job, the_machine, read_conversations(run, with_hub=True))
    found = look(CASE_RULES, case)
    yield from found
    if stopping(found, allowed):
        return
    note("trying a step, a checkpoint, and what a batch promises")
    runs_dir = Path(run.runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=runs_dir) as folder:
        yield from try_out(build_trial(case, Path(folder)), allowed)


def try_out(the_trial: Trial, allowed: frozenset[str]) -> Iterator[Finding]:
    """What is found with the model loaded."""
    for rules in TRIAL_ROUNDS:
        found = look(rules, the_trial)
        yield from found
        if stopping(found, allowed):
            return


def require_startable(run: Run, allowed: frozenset[str]) -> list[Finding]:
    """The first round, before anything is prepared; what does not stop is returned. A finished run is left in peace.

    Raises: TriviumError with all findings that stop the run.
    """
    is_finished = RunFolder(Path(run.runs_dir) / run.name).is_finished
    return [] if is_finished else _sound(look(RUN_RULES, run), allowed)


def require_sound(job: Job, the_machine: Machine, allowed: frozenset[str]) -> list[Finding]:
    """The second round, before the model is loaded; what does not stop is returned.

    Raises: TriviumError with all findings that stop the run.
    """
    return _sound(look(CASE_RULES, Case(job, the_machine, read_conversations(job.run, with_hub=False))), allowed)


def _sound(found: list[Finding], allowed: frozenset[str]) -> list[Finding]:
    if errors := stopping(found, allowed):
        raise refusal(errors, with_paragraphs=True)
    return found
