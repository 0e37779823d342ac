"""Reading run files: wrong ones are refused in good words, right ones come back as they were written."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.malformed import CASES, GOOD, Case
from trivium.config.load import differences, dump_run, flatten, load_run, to_yaml
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.config.yaml_tree import parse_tree, resolve_scalar
from trivium.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that run.yaml is named as a user names it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load_text(text: str, *overrides: str):
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_run(Path("run.yaml"), overrides)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_is_refused(case: Case, folder: Path):
    content = case.content.encode() if isinstance(case.content, str) else case.content
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_run(Path("run.yaml"), case.overrides)
    message = str(caught.value)
    for fragment in case.fragments:
        assert fragment in message
    assert caught.value.exit_code == 2
    assert "pydantic" not in message and "Input should be" not in message and "Traceback" not in message
    assert len(message) < 8000
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def test_malformed_cases_have_unique_names():
    assert len({case.name for case in CASES}) == len(CASES) > 60


def test_all_problems_are_listed_in_the_order_of_the_file(folder: Path):
    with pytest.raises(ConfigError) as caught:
        load_text("seed: -1\nmethod: scratch\nlog: {every_steps: x}\nmodel: 1M\nzzz: 1\n", "precision=fp8")
    starts = [line.split(": ")[0] for line in str(caught.value).splitlines()]
    assert starts == ["run.yaml:1", "run.yaml:3", "run.yaml:5", "run.yaml", "command line"]


@pytest.mark.parametrize("name", ["absent.yaml", ".", "a\0b", "n" * 5000])
def test_files_that_cannot_be_read(name: str, folder: Path):
    with pytest.raises(ConfigError, match="give the path of a run file|cannot be read"):
        load_run(Path(name), [])


def test_file_name_that_is_not_a_run_name(folder: Path):
    Path("my run.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match='file name: name is "my run"; expected at most 100 letters'):
        load_run(Path("my run.yaml"), [])
    assert load_run(Path("my run.yaml"), ["name=mine"]).run.name == "mine"


def test_without_a_file_everything_is_on_the_command_line(folder: Path):
    resolved = load_run(None, ["method=scratch", "name=x", "model=1M", "data=a.txt"])
    assert resolved.run.model.params == 10**6
    assert resolved.origins["model.params"] == "command line"
    with pytest.raises(ConfigError, match="command line: name is missing"):
        load_run(None, ["method=scratch", "model=1M", "data=a.txt"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("+5", 5),
        ("-.inf", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        *((word, word) for word in ("yes", "no", "on", "off", "y", "n", "tRUE", "nan", "inf", "1_000", "1:30", "0b1")),
        *((word, word) for word in ("2026-01-01", "1e", "e5", ".", "-", "0x", "1.2.3", "nUll", "<<", "=", "25M")),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    assert resolve_scalar(text) == value
    assert type(resolve_scalar(text)) is type(value)


def test_shorthands_keep_their_lines(folder: Path):
    text = "method: scratch\nmodel: 25M\ntokenizer: tok\ndata:\n- a.txt\n- path: b.txt\n  documents: line\n"
    resolved = load_text(text)
    run, origins = resolved.run, resolved.origins
    assert (run.model.params, run.tokenizer and run.tokenizer.path) == (25_000_000, "tok")
    assert [source.path for source in run.data.sources] == ["a.txt", "b.txt"]
    wanted = {
        "model.params": "run.yaml:2",
        "tokenizer.path": "run.yaml:3",
        "data.sources.0.path": "run.yaml:5",
        "data.sources.1.path": "run.yaml:6",
        "data.sources.1.documents": "run.yaml:7",
        "data.sources.0.documents": "default",
        "optimizer.lr": "default of method scratch",
        "optimizer.beta1": "default",
        "loss_tokens": "default of method scratch",
        "name": "file name",
        "seed": "default",
    }
    assert {key: origins[key] for key in wanted} == wanted
    assert origins.keys() == flatten(run).keys()


def test_overrides_set_every_kind_of_value(folder: Path):
    resolved = load_text(
        "method: scratch\nmodel: 1M\ndata: a.txt\nbudget: {epochs: 2}\n",
        "data.sources.0.weight=2",
        "data.sources.1=b.txt",
        "data.sources.1.weight=1e0",
        "optimizer.lr=1e-4",
        "sample.prompts=[Once, 'a: b']",
        "sample.prompts.1=Twice # upon: a = time",
        "budget.epochs=null",
        "budget.tokens=1.5M",
        "seed=1",
        "seed=2",
        "model.shape=null",
        "tokenizer={train: {kind: byte}}",
    )
    run = resolved.run
    assert [(source.path, source.weight) for source in run.data.sources] == [("a.txt", 2), ("b.txt", 1)]
    assert run.optimizer.lr == 1e-4
    assert run.sample.prompts == ["Once", "Twice # upon: a = time"]
    assert (run.budget.epochs, run.budget.tokens, run.seed) == (None, 1_500_000, 2)
    assert run.tokenizer and run.tokenizer.train and run.tokenizer.train.kind == "byte"
    assert resolved.origins["data.sources.0.weight"] == "command line"
    assert resolved.origins["data.sources.0.path"] == "run.yaml:3"


def test_override_of_a_shorthand_replaces_it(folder: Path):
    assert load_text(GOOD, "model=2M").run.model.params == 2_000_000
    assert [source.path for source in load_text(GOOD, "data=[x, y]").run.data.sources] == ["x", "y"]


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_three_lines_are_enough(method: str, folder: Path):
    run = load_text(f"method: {method}\nmodel: Qwen/Qwen3-0.6B\ndata: a.txt\n").run
    assert run.name == "run"
    preset = METHOD_DEFAULTS[method]
    assert (run.weights, run.trainable, run.loss_tokens) == tuple(preset[key] for key in list(preset)[:3])
    assert run.optimizer.lr == preset["optimizer"]["lr"]


def test_windows_line_ends_and_byte_order_mark(folder: Path):
    Path("run.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"seed: -1\r\n")
    with pytest.raises(ConfigError, match="run.yaml:4: seed"):
        load_run(Path("run.yaml"))


def test_differences_name_both_values(folder: Path):
    old = load_text(GOOD).run
    new = load_text(GOOD, "optimizer.lr=1e-4", "data=[a.txt, b.txt]", "schedule.kind=wsd").run
    changed = differences(old, new)
    assert "optimizer.lr: 0.001 -> 0.0001" in changed
    assert "schedule.kind: cosine -> wsd" in changed
    assert "data.sources.1.path: absent -> b.txt" in changed
    assert differences(old, old) == []
    assert "data.sources.1.path: b.txt -> absent" in differences(new, old)


def test_dump_shows_origins(folder: Path):
    resolved = load_text(GOOD, "seed=3")
    text = dump_run(resolved.run, resolved.origins)
    assert re.search(r"^method: scratch +# run\.yaml:1$", text, re.MULTILINE)
    assert re.search(r"^  lr: 0\.001 +# default of method scratch$", text, re.MULTILINE)
    assert re.search(r"^seed: 3 +# command line$", text, re.MULTILINE)
    assert re.search(r"^    - path: a\.txt +# run\.yaml:3$", text, re.MULTILINE)


TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
POSITIVE = st.integers(1, 10**15)
SHARE = st.floats(0, 0.5)


def optional(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


def one_of_keys(**choices: st.SearchStrategy) -> st.SearchStrategy:
    return st.sampled_from(sorted(choices)).flatmap(lambda name: st.fixed_dictionaries({name: choices[name]}))


def optional_roles() -> st.SearchStrategy:
    return st.dictionaries(TEXT, st.sampled_from(["user", "assistant"]), max_size=2)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Any valid run, drawn from the whole of what the configuration accepts."""
    shape = st.fixed_dictionaries(
        dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), POSITIVE)
        | {"head_dim": POSITIVE.map(lambda half: 2 * half)},
        optional={"tie_word_embeddings": st.booleans(), "rms_norm_eps": st.floats(1e-300, 1e300)},
    )
    weighted = draw(st.booleans())
    source = one_of_keys(path=TEXT, hub=TEXT, store=TEXT).flatmap(
        lambda place: st.fixed_dictionaries(
            {"fields": st.dictionaries(st.sampled_from(["prompt", "answer"]), TEXT), "roles": optional_roles()}
            | {key: st.just(value) for key, value in place.items()}
            | {"weight": st.floats(1e-6, 1e6) if weighted else st.none(), "field": TEXT, "subset": optional(TEXT)}
        )
    )
    seq_len, rows = draw(st.integers(8, 9000)), draw(st.integers(1, 50))
    weights = draw(st.sampled_from(["pretrained", "nf4", "random"]))
    kinds = {"pretrained": ["adapter", "everything"], "nf4": ["adapter"], "random": ["everything"]}
    trainable = draw(st.sampled_from(kinds[weights]))
    adapter = {"rank": draw(st.integers(1, 99)), "targets": ["q_proj"], "train_tokens": draw(optional(st.lists(TEXT)))}
    model = {"name": TEXT} if weights != "random" else {"name": TEXT, "params": POSITIVE, "shape": shape}
    train = st.fixed_dictionaries(
        {"kind": st.sampled_from(["bpe", "byte", "char"]), "vocab_size": st.integers(1, 10**5)}
    )
    return Run.model_validate(
        {
            "method": draw(st.sampled_from(list(METHOD_DEFAULTS))),
            "name": draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")),
            "weights": weights,
            "trainable": trainable,
            "adapter": adapter if trainable == "adapter" else None,
            "loss_tokens": draw(st.sampled_from(["assistant", "all"])),
            "model": draw(one_of_keys(**model)) | {"vocab_size": draw(optional(st.integers(10**5, 10**15)))},
            "data": {
                "sources": draw(st.lists(source, min_size=1, max_size=3)),
                "seq_len": seq_len,
                "held_out": draw(SHARE),
            },
            "tokenizer": draw(optional(one_of_keys(path=TEXT, train=train))),
            "optimizer": {"lr": draw(st.floats(1e-300, 0.99)), "weight_decay": draw(SHARE)},
            "schedule": {
                "kind": draw(st.sampled_from(["cosine", "wsd"])),
                "warmup_ratio": draw(SHARE),
                "decay_ratio": 0.5,
            },
            "budget": draw(one_of_keys(steps=POSITIVE, tokens=POSITIVE, epochs=st.floats(1e-3, 1e9))),
            "batch": {"tokens": seq_len * rows, "micro_tokens": draw(optional(st.just(seq_len)))},
            "sample": {"prompts": draw(st.lists(TEXT.filter(bool), max_size=3)), "temperature": draw(st.floats(0, 10))},
            "device": draw(TEXT),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "runs_dir": draw(TEXT),
        }
    )


@given(run=runs())
@settings(max_examples=200)
def test_dump_loads_back_equal(run: Run, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump_run(run, dict.fromkeys(flatten(run), "any\nwhere # \x07")), encoding="utf-8")
    assert load_run(path).run == run
    assert differences(run, load_run(path).run) == []


@given(run=runs(), cuts=st.data())
@settings(max_examples=300)
def test_a_mutated_file_loads_or_raises_config_error(
    run: Run, cuts: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    text = dump_run(run, {})
    for _ in range(cuts.draw(st.integers(1, 3))):
        start = cuts.draw(st.integers(0, len(text)))
        stop = min(len(text), start + cuts.draw(st.integers(0, 20)))
        piece = cuts.draw(
            TEXT | st.sampled_from([":", "\n", "  ", "- ", "\t", "[", "{", '"', "null", "-1", "&a ", "*a", "!!x "])
        )
        text = text[:start] + piece + text[stop:]
    path = tmp_path_factory.mktemp("mutated") / "run.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_run(path)
    except ConfigError as error:
        assert str(error).startswith((str(path), "file name: "))


@given(
    key=st.sampled_from(["seed", "model", "data.sources.0", "data.sources", "optimizer.beta1", "sample.prompts.0"])
    | TEXT,
    value=TEXT,
)
@settings(max_examples=300)
def test_any_override_loads_or_raises_config_error(key: str, value: str, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("override") / "run.yaml"
    path.write_text(GOOD)
    try:
        load_run(path, [f"{key}={value}"])
    except ConfigError as error:
        assert str(error)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(value=PLAIN)
@settings(max_examples=300)
def test_one_line_yaml_is_yaml(value: object):
    text = to_yaml(value)
    assert "\n" not in text
    assert parse_tree(f"key: {text}", "x", []).plain() == {"key": value}


@given(text=TEXT)
@settings(max_examples=300)
def test_quoted_text_is_text_to_other_readers(text: str):
    """PyYAML's own loader (YAML 1.1) is the oracle for the quoting of what is not a bare word."""
    if to_yaml(text).startswith('"'):
        assert yaml.safe_load(to_yaml(text)) == text
