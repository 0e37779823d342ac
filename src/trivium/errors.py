"""The errors a user sees, each with the exit code of the command line.

A message is one paragraph: what was found, what was expected, what to do. Any other exception is a bug.
"""


class TriviumError(Exception):
    """A command failed for a reason the user can fix."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the message says what to do."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(TriviumError):
    """The run file or a flag is wrong; nothing was written."""

    exit_code = 2


class DoesNotFit(TriviumError):
    """The run exceeds the memory, the disk or the cost limit."""

    exit_code = 3


class BadData(TriviumError):
    """Too many records were rejected, or a data file is damaged or not in the expected format."""

    exit_code = 4


class Stopped(TriviumError):
    """A signal stopped the run after it saved a checkpoint; the same command resumes it."""

    exit_code = 75


def count_of(number: int, noun: str) -> str:
    """A number with its noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_lines(error: BaseException) -> str:
    """The first two lines of an error's message on one line, at most 300 characters; its type if there are none."""
    return " ".join(str(error).strip().splitlines()[:2])[:300] or type(error).__name__
