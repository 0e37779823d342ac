"""Train under the eyes of a user: the panel while it runs, `report.html` when it ends, however it ends.

Used by `trivium train` and the quickstart.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trivium.config.load import ResolvedRun
from trivium.engine.device import Machine
from trivium.engine.runfolder import RunFolder
from trivium.engine.setup import Job
from trivium.engine.start import start
from trivium.errors import ConfigError
from trivium.report.html import write_report
from trivium.report.panel import watch


def train_with_report(
    resolved: ResolvedRun,
    before_report: Callable[[RunFolder], None] = lambda folder: None,
    examine: Callable[[Job, Machine], None] = lambda job, machine: None,
) -> RunFolder:
    """Train a run and leave its report, also when it crashes or is stopped.

    Args:
        resolved: the run.
        before_report: adds to the folder of a run that ended well what the report should show.
        examine: looks at the prepared run before anything is written, and raises if it should not begin.

    Raises: what `start` raises, after the report was written.
    """
    path = Path(resolved.run.runs_dir) / resolved.run.name
    with watch() as observer:
        try:
            folder = start(resolved, observer, examine)
        except ConfigError:
            raise  # nothing was changed, so neither is the report
        except BaseException:
            with suppress(OSError):  # a full disk must not hide what went wrong
                if (path / "metrics.jsonl").is_file():
                    write_report(path)
            raise
    before_report(folder)
    write_report(path)
    return folder
