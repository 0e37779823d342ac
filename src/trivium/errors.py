"""The errors a user sees, each with the exit code of the command line.

A message is one paragraph: what was found, what was expected, what to do. Any other exception is a bug.
"""

import re

# C0 without tab and line feed, DEL, C1, a carriage return that is not part of a line end, and lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


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


class Interrupted(TriviumError):
    """Ctrl-C ended a run at once; the message says what was saved."""

    exit_code = 130


def printable(text: str) -> str:
    """Text from a file, a model or a folder's name with its control characters shown as escapes, like \\x1b.

    A terminal obeys them: they clear the screen, change its title, or hide text.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def count_of(number: int, noun: str) -> str:
    """A number with its noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_lines(error: BaseException) -> str:
    """The first two lines of an error's message on one line, at most 300 characters; its type if there are none."""
    return " ".join(str(error).strip().splitlines()[:2])[:300] or type(error).__name__
