"""What this machine takes for each kind of work, measured once by `engine/calibrate.py` and kept in the user's folder.

Only reads, checks and writes the figures; measures nothing and never imports torch. `speed` and above import it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from trivium.config.inputs import Part
from trivium.config.yaml_tree import printable
from trivium.errors import ConfigError
from trivium.files import atomic_write
from trivium.plan.devices import home_folder

FILE_NAME = "calibration.json"

Seconds = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True)
class Calibration:
    """Measured rates of one machine.

    Attributes:
        device: its name as `devices.this_machine` gives it.
        title: the same in words.
        num_threads: threads that computed.
        seconds_per_unit: by compute dtype (`fp32`, `bf16`) and kind of work (`speed.KINDS`), what a unit takes.
        error: the largest relative error of the fit over the steps it was made from, by compute dtype.
        date: when it was measured, ISO.
        versions: of what did the computing.
    """

    device: str
    title: str
    num_threads: int
    seconds_per_unit: dict[str, dict[str, float]]
    error: dict[str, float]
    date: str
    versions: dict[str, str]


class _CalibrationFile(Part):
    """The file, checked."""

    device: str
    title: str
    num_threads: Annotated[int, Field(ge=1)]
    seconds_per_unit: dict[str, dict[str, Seconds]]
    error: dict[str, Seconds]
    date: str
    versions: dict[str, str]


def path() -> Path:
    """Where the figures lie."""
    return home_folder() / FILE_NAME


def load() -> Calibration | None:
    """The figures of this machine; None where it was never measured.

    Raises: ConfigError when the file cannot be what `save` wrote.
    """
    file = path()
    if not file.exists():
        return None
    try:
        content = _CalibrationFile.model_validate(json.loads(file.read_text()))
    except (OSError, ValueError, ValidationError) as error:
        reason = printable(str(error).splitlines()[0])
        raise ConfigError(
            f"{file} is not a calibration file ({reason}). Remove it, or measure again with `trivium plan --calibrate`."
        ) from None
    return Calibration(**content.model_dump())


def save(calibration: Calibration) -> Path:
    """Write the figures, so that a reader sees the old ones or the new; returns the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(asdict(calibration), indent=1) + "\n")
    return file
