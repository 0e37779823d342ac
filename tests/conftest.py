"""What all tests share: property tests are judged by what they find, never by how long a busy machine takes."""

import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.qwen_tokenizers import NOT_BUILT, REAL, REAL_NAMES, real_tokenizer

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
