"""Train Qwen language models. In Python: `import trivium`, then `trivium.train(...)`; docs/python.md shows how.

Importing the package loads nothing else: a name of `trivium.api` is looked up when it is first used.
"""

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.api import (
        Diagnosis,
        LoadedModel,
        ModelComparison,
        Report,
        TrainedRun,
        TrainingPlan,
        compare,
        doctor,
        evaluate,
        export,
        load,
        open_run,
        plan,
        train,
    )
    from trivium.errors import BadData, ConfigError, DoesNotFit, Stopped, TriviumError

    __version__: str

ERRORS = ("BadData", "ConfigError", "DoesNotFit", "Stopped", "TriviumError")

__all__ = [
    "BadData",
    "ConfigError",
    "Diagnosis",
    "DoesNotFit",
    "LoadedModel",
    "ModelComparison",
    "Report",
    "Stopped",
    "TrainedRun",
    "TrainingPlan",
    "TriviumError",
    "__version__",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "load",
    "open_run",
    "plan",
    "train",
]

# OpenMP threads that spin make training 20 times slower when another process needs a core; yielding after a short
# spin costs a few percent on an idle machine. libgomp reads this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


class _Package(ModuleType):
    """The package, whose functions keep their names.

    Importing the file `trivium/train.py` would make `trivium.train` that module instead of the function; likewise for
    the folders `plan` and `doctor`. Imports such as `from trivium.train import train` do not need the attribute.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """A name of `__all__`, found in the module that defines it."""
    if name == "__version__":
        from importlib.metadata import version

        return version("trivium")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("trivium.errors" if name in ERRORS else "trivium.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
