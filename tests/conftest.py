"""What all tests share: property tests are judged by what they find, never by how long a busy machine takes."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.qwen_tokenizers import NOT_BUILT, REAL, REAL_NAMES, real_tokenizer

# These models are tiny and `make test` runs one worker per core: a second thread costs more than it brings.
# torch and the processes that tests start read this when they load.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A job started in the background ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def qwen_tokenizers() -> Path:
    """The folder of the four published tokenizers; requested by the mark `needs_real`."""
    for name in REAL_NAMES:
        real_tokenizer(name)
    return REAL


@pytest.fixture(scope="session")
def real():
    """The four published tokenizers by name; do not modify them. For tests marked `needs_real`."""
    from trivium.data.tokenizer import load_tokenizer

    return {name: load_tokenizer(real_tokenizer(name)) for name in REAL_NAMES}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base model with random weights; do not modify it. Folders that need another base define their own."""
    from tests.support.models import make_base

    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base) -> Path:
    """An adapter of `base`; do not modify it."""
    from tests.support.models import make_adapter

    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A model that knows PAIRS by heart and stops after each answer; do not modify it."""
    from tests.support.models import PAIRS, make_base, teach

    folder = make_base(tmp_path_factory.mktemp("taught") / "taught", seed=3)
    teach(folder, PAIRS)
    return folder


def pytest_terminal_summary(terminalreporter):
    """Say what was not proven: every reason for which tests were skipped, the missing tokenizers in red."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("not proven here")
    for reason, count in reasons.most_common():
        missing = NOT_BUILT in reason
        terminalreporter.line(
            f"{count} tests {'NOT RUN' if missing else 'skipped'}: {reason}", red=missing, bold=missing
        )
