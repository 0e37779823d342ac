"""The errors a user sees, each with the exit code the command line ends with.

A message is one paragraph: what was found, what was expected, what to do. Any other exception is a bug.
"""


class TriviumError(Exception):
    """A run, build or command failed for a reason the user can act on."""

    exit_code = 1


class ConfigError(TriviumError):
    """The run file, a flag or a combination of them is wrong; nothing was written."""

    exit_code = 2


class DoesNotFit(TriviumError):
    """The work does not fit the memory, the disk or the cost limit."""

    exit_code = 3


class BadData(TriviumError):
    """Too many records are rejected, or the data is not what it claims to be."""

    exit_code = 4


class Stopped(TriviumError):
    """The run was asked to stop and has saved a checkpoint; the same command resumes it."""

    exit_code = 75


def first_lines(error: BaseException) -> str:
    """The first two lines of an error's message on one line, at most 300 characters; its type if there are none."""
    return " ".join(str(error).strip().splitlines()[:2])[:300] or type(error).__name__
