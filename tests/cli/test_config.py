"""`trivium config` in real processes and against the JSON schema's own reference checker."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from tests.malformed import CASES, GOOD, MISSING, OUT_OF_RANGE, UNKNOWN_KEYS, WRONG_CHOICES, WRONG_TYPES, Case
from trivium.cli.config import config
from trivium.cli.main import trivium
from trivium.config.explain import RENAMED_KEYS, json_schema, key_at, keys, suggest
from trivium.config.load import dump_run, load_run
from trivium.config.run import METHOD_DEFAULTS
from trivium.config.yaml_tree import parse_tree


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(GOOD)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(trivium, ["config", *arguments])


def test_show_prints_only_the_dump():
    result = invoke("show", "run.yaml", "seed=7")
    resolved = load_run(Path("run.yaml"), ["seed=7"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == dump_run(resolved.run, resolved.origins)


def test_show_as_json():
    shown = json.loads(invoke("show", "run.yaml", "--json", "optimizer.lr=1e-4").stdout)
    assert shown["run"]["optimizer"]["lr"] == 1e-4
    assert shown["origins"]["optimizer.lr"] == "command line"
    assert shown["origins"]["model.params"] == "run.yaml:2"


@pytest.mark.parametrize("case", CASES[::12], ids=lambda case: case.name)
def test_errors_in_a_real_process(case: Case, folder: Path):
    """Every twelfth malformed file through the command: exit 2, words on stderr, no traceback, nothing written."""
    content = case.content.encode() if isinstance(case.content, str) else case.content
    (folder / "run.yaml").write_bytes(content)
    command = [sys.executable, "-m", "trivium.cli", "config", "show", "run.yaml", *case.overrides]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trivium: ") and "Traceback" not in done.stderr
    assert all(fragment in done.stderr for fragment in case.fragments)
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_explain_one_key():
    text = invoke("explain", "optimizer.lr", "--file", "run.yaml").stdout
    assert "Peak learning rate." in text
    assert "a number above 0 and below 1" in text
    for method, preset in METHOD_DEFAULTS.items():
        assert f"{preset['optimizer']['lr']} with method {method}" in text
    assert "0.001 (default of method scratch)" in text


def test_explain_lists_every_key_and_its_meaning():
    text = invoke("explain").stdout
    assert len(text.splitlines()) == len(keys())
    for key in keys().values():
        assert key.doc and key.doc.partition(". ")[0].rstrip(".") in text
        assert invoke("explain", key.dotted).exit_code == 0


def test_explain_shows_what_a_file_sets():
    (Path("run.yaml")).write_text(GOOD + "sample: {prompts: [Once]}\n")
    assert "sample.prompts is [Once] (run.yaml:4)" in invoke("explain", "--file", "run.yaml").stdout
    assert (
        "data.sources.0.path is a.txt (run.yaml:3)"
        in invoke("explain", "data.sources.N.path", "--file", "run.yaml").stdout
    )


def test_explain_an_unknown_key():
    result = invoke("explain", "optimizer.lr_rat")
    assert result.exit_code == 2
    assert result.stderr == "trivium: optimizer.lr_rat is not a known key; did you mean optimizer.lr?\n"


BEFORE_EXAMPLE = {
    "model.shape": [
        "model={shape: {hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2}}"
    ],
    "model.name": ["model={}"],
    "model.params": ["model={}"],
    "weights": ["model=Qwen/Qwen3-0.6B"],
    "trainable": ["model=Qwen/Qwen3-0.6B", "method=lora"],
    "adapter": ["model=Qwen/Qwen3-0.6B", "method=lora"],
    "adapter.train_tokens": ["model=Qwen/Qwen3-0.6B", "method=lora"],
    "adapter.targets": ["model=Qwen/Qwen3-0.6B", "method=lora"],
    "data.sources.N.hub": ["data.sources.0.path=null"],
    "data.sources.N.store": ["data.sources.0.path=null"],
}
"""What a run needs, or must not have, for the example of a key or of its children to make sense."""


@pytest.mark.parametrize("dotted", keys())
def test_every_default_and_example_is_accepted(dotted: str):
    """An example that the configuration refuses would be worse than none."""
    result = invoke("explain", dotted)
    override = next(line for line in result.stdout.splitlines() if line.startswith("  example")).removeprefix(
        "  example  "
    )
    load_run(
        Path("run.yaml"),
        [*BEFORE_EXAMPLE.get(dotted.rpartition(".")[0], []), *BEFORE_EXAMPLE.get(dotted, []), override],
    )


def test_schema_is_a_valid_schema():
    schema = json.loads(invoke("schema").stdout)
    assert schema == json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "method: lora\nmodel: Qwen/Qwen3-0.6B\ndata: [a.txt, {path: b.txt, documents: line}]\n",
        "method: scratch\nmodel: {params: 1.5M}\ndata: {sources: [a], seq_len: 512}\nbudget: {tokens: 1e6}\n",
        "method: scratch\nmodel: {params: 25000000}\ndata: {sources: [{hub: x, weight: 1}]}\ntokenizer: tok\nseed: 3\n",
        "method: scratch\nmodel: 1M\ndata: a\ntokenizer: {train: {kind: byte}}\nbatch: {tokens: 1.024M}\n",
    ],
)
def test_schema_accepts_what_the_reader_accepts(text: str):
    Path("run.yaml").write_text(text)
    resolved = load_run(Path("run.yaml"))
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(parse_tree(text, "run.yaml", []).plain())
    validator.validate(resolved.run.model_dump())


ABSURD = ("number of 5000 digits", "count of 500 digits")
BEYOND_JSON = ("nan", "infinity", "minus infinity", "float that overflows", "infinitely many steps", *ABSURD)
READABLE = [*UNKNOWN_KEYS, *WRONG_TYPES, *OUT_OF_RANGE, *WRONG_CHOICES, *MISSING]


@pytest.mark.parametrize(
    "case", [case for case in READABLE if case.name not in BEYOND_JSON], ids=lambda case: case.name
)
def test_schema_refuses_what_the_reader_refuses(case: Case):
    value = parse_tree(str(case.content), "run.yaml", []).plain()
    assert list(jsonschema.Draft202012Validator(json_schema()).iter_errors(value))


def test_nearest_keys():
    assert suggest(("optimizer", "lerning_rate")) == "did you mean optimizer.lr?"
    assert suggest(("learning_rate",)) == "did you mean optimizer.lr?"
    for old, new in RENAMED_KEYS.items():
        assert suggest((*new.split(".")[:-1], old)) == f"did you mean {new}?"
        assert key_at(tuple(new.split("."))) is not None
    assert key_at(("data", "sources", 3, "path")) == keys()["data.sources.N.path"]
    assert key_at(("data", "sources", "first")) is None
    assert set(config.commands) == {"show", "explain", "schema"}
