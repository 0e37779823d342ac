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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
