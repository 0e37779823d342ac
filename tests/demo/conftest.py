"""The real model, for the long tests."""

from pathlib import Path

import pytest

from tests.support.qwen_tokenizers import CACHE
from trivium.demo import model as demo


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real model; do not modify it."""
    return demo.fetch(CACHE / "smollm2-135m-instruct")
