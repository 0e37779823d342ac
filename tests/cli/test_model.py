"""`trivium model` as a user types it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from trivium.cli.model import model, parse_size
from trivium.errors import ConfigError
from trivium.model import catalog


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(model, arguments)


def test_list_shows_every_size_with_its_exact_parameters() -> None:
    lines = invoke("list").stdout.splitlines()
    assert lines[0].split()[:3] == ["name", "family", "params"]
    assert [line.split()[0] for line in lines[1:]] == catalog.names()
    assert "494,032,768" in next(line for line in lines if line.startswith("Qwen2.5-0.5B "))


def test_list_as_json() -> None:
    sizes = {size["name"]: size for size in json.loads(invoke("list", "--json").stdout)}
    assert list(sizes) == catalog.names()
    assert sizes["Qwen3-0.6B"]["num_params"] == 596_049_920
    assert sizes["Qwen3-0.6B"]["num_embedding_params"] == 151_936 * 1024


def test_size_shows_the_model_and_its_embeddings() -> None:
    shape = catalog.size_for_budget(25_000_000, 8192)
    shown = invoke("size", "--params", "25M", "--vocab", "8192").stdout
    assert f"{shape.num_params:,}" in shown
    assert f"{shape.num_embedding_params:,}" in shown
    assert "151,936" in shown and "embeddings" in shown


def test_size_as_json() -> None:
    found = json.loads(invoke("size", "--params", "1M", "--vocab", "2K", "--family", "qwen2", "--json").stdout)
    assert found["budget"] == 1_000_000
    assert found["family"] == "qwen2"
    assert abs(found["num_params"] / 1_000_000 - 1) < 0.05
    assert "2,430,976" in found["at_qwen_vocabulary"]["does_not_fit"]


@pytest.mark.parametrize(
    ("text", "count"), [("25M", 25_000_000), ("1.5b", 1_500_000_000), ("7k", 7000), ("8_192", 8192), ("8,192", 8192)]
)
def test_parse_size(text: str, count: int) -> None:
    assert parse_size(text, "--params") == count


@pytest.mark.parametrize("text", ["", "0", "-5M", "25X", "M", "1e6", "nan", "inf", "0.4", "1.2.3M"])
def test_parse_size_refuses_nonsense(text: str) -> None:
    with pytest.raises(ConfigError, match="--params"):
        parse_size(text, "--params")


def test_errors_reach_the_main_entry() -> None:
    result = invoke("size", "--params", "1M", "--vocab", "151936")
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2


def test_torch_is_never_imported() -> None:
    program = (
        "import sys, trivium.cli.model, trivium.model.catalog; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
