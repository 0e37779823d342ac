"""Hugging Face folders: exchange with transformers, and folders that are refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trivium.errors import ConfigError, TriviumError
from trivium.model import hf
from trivium.model.qwen import Documents, Qwen, init_weights
from trivium.model.resolve import shape_of_name
from trivium.model.shape import QwenShape

TIED = QwenShape("qwen3", 96, 32, 64, 2, 4, 2, 16, True)
UNTIED = QwenShape("qwen2", 96, 32, 64, 3, 2, 1, 16, False)
LLAMA = QwenShape("llama", 96, 48, 64, 2, 3, 1, 16, True, rope_theta=1e5, rms_norm_eps=1e-5)
GENERATION = {"eos_token_id": [5, 3], "pad_token_id": 3, "bos_token_id": 3, "max_new_tokens": 8}


def model_of(shape: QwenShape, seed: int = 0) -> Qwen:
    model = Qwen(shape)
    init_weights(model, seed)
    return model


def save(model: Qwen, folder: Path, **options: object) -> Path:
    settings = {"tokenizer_folder": None, "dtype": torch.float32, "generation": GENERATION}
    hf.save_folder(model, folder, **(settings | options))
    return folder


def logits(model: Qwen, tokens: torch.Tensor) -> torch.Tensor:
    length = len(tokens)
    documents = Documents(torch.tensor([0, length], dtype=torch.int32), (0, length), length)
    hidden = model(tokens, torch.arange(length), documents)
    return F.linear(hidden, model.head_weight.to(hidden.dtype))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Change tensors of a saved folder; None removes one."""
    tensors = load_file(folder / hf.WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / hf.WEIGHTS)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    words = {"<eos>": 0, "<pad>": 1, "once": 2, "upon": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    (folder / "run_me.py").write_text("raise SystemExit('never copied')")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TIED, UNTIED, LLAMA], ids=["tied", "untied", "llama"])
@pytest.mark.parametrize("max_shard_bytes", [hf.MAX_SHARD_BYTES, 20_000])
def test_save_folder_loads_in_transformers(
    shape: QwenShape, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path
) -> None:
    ours = model_of(shape)
    folder = save(ours, tmp_path / "model", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert (folder / hf.INDEX).exists() == (max_shard_bytes == 20_000)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    assert theirs.dtype == dtype
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.to(dtype), expected.pop(name)), name
    assert not expected

    again = Qwen(hf.read_shape(folder))
    hf.load_weights(again, folder)
    assert again.shape == shape
    tokens = torch.arange(20) % shape.vocab_size
    again.compute_dtype = dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits(again, tokens), theirs(tokens[None]).logits[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", [TIED, LLAMA], ids=["qwen3", "llama"])
def test_save_folder_generates_in_transformers(shape: QwenShape, tmp_path: Path) -> None:
    model = model_of(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / "model"))
    assert theirs.generation_config.eos_token_id == [5, 3]
    assert (theirs.config.eos_token_id, theirs.config.pad_token_id) == (5, 3)
    prompt = torch.tensor([1, 2, 4])
    written = theirs.generate(prompt[None], do_sample=False)[0]
    for length in range(len(prompt), len(written)):
        assert logits(model, written[:length])[-1].argmax() == written[length]


@pytest.mark.parametrize("shape", [TIED, UNTIED, LLAMA], ids=["qwen3", "qwen2", "llama"])
def test_a_model_saved_without_token_ids_gets_none_from_transformers(shape: QwenShape, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save(model_of(shape), tmp_path / "model", generation={}))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_save_folder_copies_tokenizer_and_stop_ids(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = save(model_of(TIED), tmp_path / "model", tokenizer_folder=tokenizer_folder, generation=None)
    assert AutoTokenizer.from_pretrained(folder)("once upon")["input_ids"] == [2, 3]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 0, "pad_token_id": 1}
    assert not (folder / "run_me.py").exists()


def test_load_weights_converts_dtypes(tmp_path: Path) -> None:
    ours = model_of(UNTIED)
    folder = save(ours, tmp_path / "model", dtype=torch.bfloat16)
    again = Qwen(UNTIED)
    hf.load_weights(again, folder)
    for left, right in zip(ours.parameters(), again.parameters(), strict=True):
        assert right.dtype == torch.float32
        assert torch.equal(left.bfloat16().float(), right)


def test_load_weights_reads_tensors_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "PIECE_BYTES", 1000)
    ours, again = model_of(UNTIED), Qwen(UNTIED)
    hf.load_weights(again, save(ours, tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_stored_head_of_a_tied_model_must_equal_its_embeddings(tmp_path: Path) -> None:
    folder = save(model_of(TIED), tmp_path / "model")
    embeddings = load_file(folder / hf.WEIGHTS)[hf.EMBEDDINGS]
    rewrite(folder, {hf.HEAD: embeddings.clone()})
    hf.load_weights(Qwen(TIED), folder)
    rewrite(folder, {hf.HEAD: embeddings + 1})
    with pytest.raises(ConfigError, match="differs"):
        hf.load_weights(Qwen(TIED), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({hf.EMBEDDINGS: None}, "embed_tokens.weight is missing"),
        ({"model.norm.weight": torch.ones(31)}, r"shape \(31,\) instead of \(32,\)"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}, "not part of the model"),
        ({hf.HEAD: torch.ones(95, 32)}, r"lm_head.weight has shape \(95, 32\)"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "as I8"),
    ],
)
def test_load_weights_names_tensors_that_do_not_fit(
    change: dict[str, torch.Tensor | None], words: str, tmp_path: Path
) -> None:
    folder = save(model_of(TIED), tmp_path / "model")
    rewrite(folder, change)
    model = model_of(TIED, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        hf.load_weights(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bad", "words"), [(float("nan"), "a NaN"), (float("-inf"), "an infinity")])
def test_weights_that_are_not_finite_are_named(dtype: torch.dtype, bad: float, words: str, tmp_path: Path):
    shards = save(model_of(UNTIED), tmp_path, max_shard_bytes=20_000)
    name = "model.layers.1.mlp.up_proj.weight"
    file = hf.find_tensors(UNTIED, shards)[name]
    tensors = {key: value.to(dtype) for key, value in load_file(file).items()}
    tensors[name][13, 7] = bad
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"{file.name} holds {words} in {name}, first in row 13;"):
        hf.load_weights(Qwen(UNTIED), shards)


def test_weights_with_a_sum_that_overflows_are_loaded(tmp_path: Path):
    """A finite tensor may have an infinite sum."""
    folder = save(model_of(TIED), tmp_path)
    large = torch.full((96, 32), 3e38)
    rewrite(folder, {hf.EMBEDDINGS: large})
    model = Qwen(TIED)
    hf.load_weights(model, folder)
    assert torch.equal(model.model.embed_tokens.weight, large)


def test_load_weights_refuses_an_untied_model_without_head(tmp_path: Path) -> None:
    folder = save(model_of(UNTIED), tmp_path / "model")
    rewrite(folder, {hf.HEAD: None})
    with pytest.raises(ConfigError, match="lm_head.weight is missing"):
        hf.load_weights(Qwen(UNTIED), folder)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin", 7, ""]
)
def test_index_must_not_point_outside_its_folder(shard: object, tmp_path: Path) -> None:
    folder = save(model_of(TIED), tmp_path / "model")
    (folder / hf.WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {hf.EMBEDDINGS: shard}}))
    with pytest.raises(ConfigError, match="lists the weight file"):
        hf.load_weights(Qwen(TIED), folder)


@pytest.mark.parametrize(
    "index", ["{}", "[]", "not json", '{"weight_map": {}}', '{"weight_map": {"a": "b.safetensors"}}']
)
def test_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    folder = save(model_of(TIED), tmp_path / "model")
    (folder / hf.WEIGHTS).unlink()
    (folder / hf.INDEX).write_text(index)
    with pytest.raises(ConfigError):
        hf.load_weights(Qwen(TIED), folder)


def test_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    folder = save(model_of(TIED), tmp_path / "model")
    os.truncate(folder / hf.WEIGHTS, 5000)
    with pytest.raises(ConfigError, match="not a complete safetensors file"):
        hf.load_weights(Qwen(TIED), folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="safetensors only"):
        hf.load_weights(Qwen(TIED), tmp_path)


def test_folder_without_a_model_is_not_read_or_replaced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        hf.read_shape(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not touched"):
        save(model_of(TIED), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_save_folder_replaces_an_older_model(tmp_path: Path) -> None:
    save(model_of(TIED, seed=1), tmp_path / "model", max_shard_bytes=20_000)
    newer = model_of(TIED, seed=2)
    again = Qwen(TIED)
    hf.load_weights(again, save(newer, tmp_path / "model"))
    assert all(torch.equal(a, b) for a, b in zip(newer.parameters(), again.parameters(), strict=True))
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("result", "hint"),
    [
        ("model", "Set model: {run}/model."),
        ("adapter", "trivium export {run} --merge --out {run}-merged. Then set model: {run}-merged."),
        (None, "finish it with: trivium train {run}/run.yaml"),
    ],
)
def test_the_folder_of_a_run_hints_at_its_model(result: str | None, hint: str, tmp_path: Path):
    run = tmp_path / "run"
    if result is None:
        run.mkdir()
    else:
        save(model_of(TIED), run / result)
    (run / "run.yaml").write_text("method: full\n")
    for read in (hf.find_folder, shape_of_name):
        with pytest.raises(ConfigError, match=re.escape(hint.format(run=run))):
            read(str(run))


def test_find_folder_explains_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hf.find_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="not a Hub id"):
        hf.find_folder("./no/such/folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="could not be downloaded from the Hub"):
        hf.find_folder("trivium-tests/no-such-model")


SAVE_FOREVER = """
import itertools, sys, torch
from pathlib import Path
from trivium.model import hf
from trivium.model.qwen import Qwen, init_weights
from trivium.model.shape import QwenShape
model = Qwen(QwenShape("qwen3", 4096, 128, 256, 4, 4, 2, 32, True))
init_weights(model, 0)
for number in itertools.count(1):
    for parameter in model.parameters():
        parameter.data.fill_(number)
    hf.save_folder(model, Path(sys.argv[1]), None, torch.float32, {})
    if number == 2:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.013, 0.051, 0.128])
def test_save_folder_killed_midway_leaves_a_complete_model(seconds: float, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    command = [sys.executable, "-c", SAVE_FOREVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    whole = folder if folder.exists() else tmp_path / ".model.replaced"
    model = Qwen(hf.read_shape(whole))
    hf.load_weights(model, whole)
    values = {value for parameter in model.parameters() for value in (parameter.min().item(), parameter.max().item())}
    assert len(values) == 1
    save(model_of(TIED), folder)
    assert os.listdir(tmp_path) == ["model"]


MEASURE_LOAD = """
import re, sys, torch
from pathlib import Path
from trivium.model import hf
from trivium.model.qwen import Qwen
folder = Path(sys.argv[1])
def peak():  # not ru_maxrss, which begins at the size of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
with torch.device("meta"):
    model = Qwen(hf.read_shape(folder))
model.to_empty(device="cpu")
hf.load_weights(model, folder)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_load_weights_needs_little_extra_memory(tmp_path: Path) -> None:
    shape = QwenShape("qwen3", 16384, 1024, 3072, 7, 8, 4, 128, True)
    model = Qwen(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    folder = save(model, tmp_path / "model")
    size = (folder / hf.WEIGHTS).stat().st_size
    assert size > 400e6
    done = subprocess.run([sys.executable, "-c", MEASURE_LOAD, str(folder)], capture_output=True, text=True, check=True)
    assert size < int(done.stdout) < 1.25 * size


def test_save_folder_checks_free_space_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(model_of(TIED, seed=1), tmp_path / "model")
    content = (older / hf.WEIGHTS).read_bytes()
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("trivium.files.shutil.disk_usage", lambda folder: free)
    with pytest.raises(TriviumError, match="Not enough disk space"):
        save(model_of(TIED, seed=2), tmp_path / "model")
    assert (older / hf.WEIGHTS).read_bytes() == content
