"""The measured speed of this machine: reads and writes the file of `measure/calibrate.py`. Never imports torch."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trivium.config.inputs import Part
from trivium.config.yaml_tree import printable
from trivium.errors import ConfigError
from trivium.files import atomic_write
from trivium.plan.devices import home_folder

Seconds = Annotated[float, Field(ge=0.0)]


class Calibration(Part):
    """Measured speed of one machine.

    Attributes:
        device: `name` of the device, from `devices.this_machine`.
        title: title of the device.
        num_threads: CPU threads used.
        seconds_per_unit: by compute dtype (`fp32`, `bf16`) and kind of work (`speed.KINDS`).
        error: largest relative error of the fit over the timed steps, by compute dtype.
        date: ISO date of the measurement.
        versions: of torch and trivium.
    """

    device: str
    title: str
    num_threads: Annotated[int, Field(ge=1)]
    seconds_per_unit: dict[str, dict[str, Seconds]]
    error: dict[str, Seconds]
    date: str
    versions: dict[str, str]


def path() -> Path:
    """The calibration file in the user's folder."""
    return home_folder() / "calibration.json"


def load() -> Calibration | None:
    """The calibration of this machine; None if there is none.

    Raises: ConfigError if the file is not a calibration.
    """
    file = path()
    if not file.exists():
        return None
    try:
        return Calibration.model_validate(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        reason = printable(str(error).splitlines()[0])
        raise ConfigError(
            f"{file} is not a calibration file ({reason}). Remove it, or measure again: trivium plan --calibrate"
        ) from None


def save(calibration: Calibration) -> Path:
    """Write the calibration atomically; returns the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, calibration.model_dump_json(indent=1) + "\n")
    return file
