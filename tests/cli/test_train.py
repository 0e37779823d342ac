"""The command line as a user has it: train, stop, go on, verify, chat, with real files.

Signals, exit codes and what goes to stdout are seen in real processes (`trivium`); the rest runs here (`invoke`).
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.engine.runs import write_corpus
from trivium.cli.main import trivium as cli
from trivium.engine.runfolder import RunFolder
from trivium.train import interrupted

RUN_FILE = """
method: scratch
model:
  shape: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer:
  train: {kind: byte, vocab_size: 259}
data:
  sources: [stories.jsonl]
  seq_len: 64
  held_out: 0.05
batch: {tokens: 256}
eval: {max_tokens: 512}
sample: {prompts: [Once], max_new_tokens: 8}
"""


def trivium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trivium.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def invoke(folder: Path, *arguments: str) -> Result:
    """The same command in this process, which spares the seconds of importing torch."""
    with chdir(folder):
        return CliRunner().invoke(cli, arguments)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a run file, its data, and a finished run of it."""
    folder = tmp_path_factory.mktemp("workplace")
    write_corpus(folder / "stories.jsonl", 60)
    (folder / "small.yaml").write_text(RUN_FILE)
    done = trivium(folder, "train", "small.yaml", "budget.steps=12")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/small/model\n"
    return folder


def test_train_writes_the_documented_files(workplace):
    run = workplace / "runs" / "small"
    expected = {"run.yaml", "provenance.json", "metrics.jsonl", "ledger.jsonl", "samples.jsonl", "report.html", "model"}
    assert expected <= {path.name for path in run.iterdir()}
    steps = [record["step"] for record in RunFolder(run).metrics if "eval/loss" in record]
    assert steps[0] == 0 and steps[-1] == 12
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["versions"]["torch"] and provenance["data"][0]["fingerprint"] and provenance["num_steps"] == 12
    assert "<html" in (run / "report.html").read_text()


def test_stock_transformers_loads_the_result_and_generates(workplace):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workplace / "runs" / "small" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(
        **tokenizer("Once upon", return_tensors="pt", return_token_type_ids=False), max_new_tokens=5
    )
    assert 9 < output.shape[1] <= 14
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


def test_a_finished_run_says_so_and_exits_0(workplace):
    again = invoke(workplace, "train", "small.yaml", "budget.steps=12")
    assert again.exit_code == 0 and "is finished" in again.stderr and again.stdout == "runs/small/model\n"


def test_train_refuses_other_settings_by_name(workplace):
    other = invoke(workplace, "train", "small.yaml", "budget.steps=13")
    assert other.exit_code == 2 and "budget.steps" in other.stderr and "12" in other.stderr and "13" in other.stderr


def test_verify_accepts_the_run_and_finds_changes(workplace, tmp_path):
    proof = invoke(workplace, "verify", "runs/small", "--json")
    assert proof.exit_code == 0, proof.stderr
    assert json.loads(proof.stdout)["num_steps"] == 12 and json.loads(proof.stdout)["is_finished"]
    ledger = workplace / "runs" / "small" / "ledger.jsonl"
    whole = ledger.read_text()
    lines = whole.splitlines(keepends=True)
    try:
        for changed in (
            [*lines[:5], *lines[6:]],  # a step skipped
            [*lines[:5], lines[4], *lines[5:]],  # a step repeated
            [*lines[:3], lines[4].replace('"step": 5', '"step": 4'), *lines[4:]],  # other tokens
            lines[:-1],  # the end missing
        ):
            ledger.write_text("".join(changed))
            assert invoke(workplace, "verify", "runs/small").exit_code == 1
    finally:
        ledger.write_text(whole)


def test_verify_finds_another_result(workplace):
    weights = workplace / "runs" / "small" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused = invoke(workplace, "verify", "runs/small")
        assert refused.exit_code == 1 and "model.safetensors was changed after the run" in refused.stderr
    finally:
        weights.write_bytes(whole)


def test_chat_runs_no_code_of_the_folder_and_reads_no_pickle(workplace):
    import torch

    strange = workplace / "strange"
    shutil.copytree(workplace / "runs" / "small" / "model", strange)
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    refused = invoke(workplace, "chat", "strange", "-p", "Once")
    assert refused.exit_code == 2 and "auto_map" in refused.stderr
    (strange / "config.json").write_text(json.dumps(config))
    (strange / "model.safetensors").unlink()
    torch.save({}, strange / "pytorch_model.bin")
    refused = invoke(workplace, "chat", "strange", "-p", "Once")
    assert refused.exit_code == 2 and "safetensors" in refused.stderr


def test_chat_completes_a_prompt_from_the_command_line(workplace):
    spoken = invoke(workplace, "chat", "runs/small", "-p", "Once upon", "--max-new-tokens", "6", "--seed", "1")
    assert spoken.exit_code == 0, spoken.stderr
    assert spoken.stdout.startswith("Once upon") and len(spoken.stdout) > len("Once upon\n")
    nothing = invoke(workplace, "chat", "no-such-folder", "-p", "x")
    assert nothing.exit_code == 2 and "is not a model" in nothing.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_75(workplace, stop):
    name = f"stopped-{stop.name}"
    command = [sys.executable, "-m", "trivium.cli", "train", "small.yaml", "budget.steps=4000", f"name={name}"]
    process = subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(workplace / "runs" / name)
    while process.poll() is None and len(list(folder.ledger)) < 3:
        time.sleep(0.01)
    process.send_signal(stop)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert stop.name in errors and "run the same command again" in errors
    assert list(folder.checkpoints.glob("step-*")) and (folder.path / "report.html").is_file()
    proof = invoke(workplace, "verify", f"runs/{name}")
    assert proof.exit_code == 0 and "unfinished" in proof.stdout


def test_a_second_ctrl_c_says_what_was_saved(workplace):
    command = [sys.executable, "-m", "trivium.cli", "train", "small.yaml", "name=twice", "budget.steps=40"]
    command += ["batch.tokens=2097152", "batch.micro_tokens=256", "checkpoint.every_steps=1"]  # long steps
    process = subprocess.Popen(command, cwd=workplace, stderr=subprocess.PIPE, text=True)
    folder = RunFolder(workplace / "runs" / "twice")
    while process.poll() is None and not (folder.path / "metrics.jsonl").is_file():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "trivium: Interrupted: runs/twice was stopped at once. It has no checkpoint yet; the same" in errors
    fast = invoke(workplace, "train", "small.yaml", "name=thrice", "budget.steps=2")
    assert fast.exit_code == 0
    assert "newest checkpoint is after step 2; later" in str(interrupted(workplace / "runs" / "thrice"))


def test_an_adapter_is_trained_on_conversations_and_its_result_named(workplace):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in "abc"
    ]
    (workplace / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    (workplace / "tune.yaml").write_text(
        "method: lora\nmodel: runs/small/model\ndata: {sources: [talk.jsonl], seq_len: 64}\nbatch: {tokens: 256}\n"
        "budget: {steps: 4}\nadapter: {rank: 2}\noptimizer: {lr: 5e-3}\nsample: {prompts: [What?]}\n"
    )
    done = invoke(workplace, "train", "tune.yaml")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "runs/tune/adapter\n"
    assert "of them trained in an adapter with scaling 2" in done.stderr and "30 records" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "--lora-modules tune=runs/tune/adapter --generation-config runs/tune/adapter" in last
    assert "warning: Q19" in done.stderr
    assert invoke(workplace, "verify", "runs/tune").exit_code == 0


def test_nan_stops_the_run_and_names_the_documents(workplace):
    from safetensors.torch import load_file, save_file

    broken = workplace / "broken"
    shutil.copytree(workplace / "runs" / "small" / "model", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] = 3e38  # finite, but no sum of it is
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for held_out, what in ((0.0, "the loss is nan"), (0.05, "the held-out loss is nan")):
        (workplace / "nan.yaml").write_text(
            f"method: continue\nmodel: broken\ndata: {{sources: [stories.jsonl], seq_len: 64, held_out: {held_out}}}\n"
            "batch: {tokens: 256}\nbudget: {steps: 4}\n"
        )
        stopped = invoke(workplace, "train", "nan.yaml")
        assert stopped.exit_code == 1, stopped.stderr
        assert what in stopped.stderr and "Once upon a time" in stopped.stderr
        failure = json.loads((workplace / "runs" / "nan" / "failure.json").read_text())
        assert failure["step"] == 0 and len(failure["documents"]) >= 1
        assert not list((workplace / "runs" / "nan" / "checkpoints").iterdir())
        assert "not finite" in (workplace / "runs" / "nan" / "report.html").read_text()


def test_missing_data_leaves_no_run_folder(workplace):
    (workplace / "gone.yaml").write_text("method: scratch\nmodel: 1M\ndata: gone.jsonl\n")
    refused = invoke(workplace, "train", "gone.yaml")
    assert refused.exit_code == 2 and "gone.jsonl" in refused.stderr
    assert not (workplace / "runs" / "gone").exists()


def test_continue_starts_from_a_finished_model(workplace):
    before = [
        record["eval/loss"] for record in RunFolder(workplace / "runs" / "small").metrics if "eval/loss" in record
    ]
    (workplace / "more.yaml").write_text(
        "method: continue\nmodel: runs/small/model\ndata: {sources: [stories.jsonl], seq_len: 64, held_out: 0.05}\n"
        "batch: {tokens: 256}\neval: {max_tokens: 512}\nbudget: {steps: 4}\n"
    )
    done = invoke(workplace, "train", "more.yaml")
    assert done.exit_code == 0, done.stderr
    losses = [record["eval/loss"] for record in RunFolder(workplace / "runs" / "more").metrics if "eval/loss" in record]
    assert losses[0] == pytest.approx(before[-1], rel=0.02)


def test_train_on_a_megatron_store_mixed_with_text(workplace):
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = workplace / "ready"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        builder.add_item(torch.randint(0, 256, (30,), generator=generator))
        builder.add_item(torch.tensor([257, 256]))  # a second sequence of the same document
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    (workplace / "mixed.yaml").write_text(
        "method: scratch\nmodel: {shape: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
        "num_attention_heads: 2}}\ntokenizer: runs/small/model\nbatch: {tokens: 256}\nbudget: {steps: 4}\n"
        "data:\n  seq_len: 64\n  held_out: 0.05\n  sources:\n"
        "    - {store: ready, weight: 3}\n    - {path: stories.jsonl, weight: 1}\n"
    )
    done = invoke(workplace, "train", "mixed.yaml")
    assert done.exit_code == 0, done.stderr
    data = json.loads((workplace / "runs" / "mixed" / "provenance.json").read_text())["data"]
    assert data[0]["num_tokens"] == 40 * 32 and data[0]["token_share"] == pytest.approx(0.75, abs=0.05)
    assert "(ready 7" in done.stderr and "Q02" not in done.stderr
    assert invoke(workplace, "verify", "runs/mixed").exit_code == 0


def test_train_warns_about_a_ready_store_without_end_tokens(workplace):
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(workplace / "endless.bin"), dtype=np.uint16)
    for start in range(30):
        builder.add_document(torch.arange(start, start + 20), [20])
    builder.finalize(str(workplace / "endless.idx"))
    (workplace / "endless.yaml").write_text(
        "method: continue\nmodel: runs/small/model\nbatch: {tokens: 256}\nbudget: {steps: 1}\n"
        "data: {sources: [{store: endless}], seq_len: 64}\n"
    )
    done = invoke(workplace, "train", "endless.yaml")
    assert done.exit_code == 0, done.stderr
    assert "Q02" in done.stderr and "nothing is held out" in done.stderr


def test_quickstart_on_a_text_file(workplace):
    text = "\n\n".join(f"The {n}th line of a poem about the number {n}, and about {n * n}." for n in range(300))
    (workplace / "poem.txt").write_text(text)
    settings = ("-s", "budget.tokens=4096", "-s", "tokenizer.train.vocab_size=300", "-s", "sample.max_new_tokens=8")
    done = invoke(workplace, "quickstart", "poem.txt", *settings)
    assert done.exit_code == 0, done.stderr
    assert "Held-out loss" in done.stdout and "lowest possible" not in done.stdout
    assert (workplace / "runs" / "quickstart-poem" / "report.html").is_file()
    missing = invoke(workplace, "quickstart", "nothing.txt")
    assert missing.exit_code == 2 and "nothing.txt does not exist" in missing.stderr
