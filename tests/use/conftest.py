"""One base, one adapter and one model that answers, made once for all tests here; nobody writes into them."""

from pathlib import Path

import pytest

from tests.use.models import make_adapter, make_base, teach

PAIRS = [
    ("What does Lily draw?", "A house."),
    ("Where is the boat?", "On the lake."),
    ("Who sings?", '{"name": "owl"}'),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A whole model that knows PAIRS by heart and stops after each answer."""
    folder = make_base(tmp_path_factory.mktemp("taught") / "taught", seed=3)
    teach(folder, PAIRS)
    return folder
