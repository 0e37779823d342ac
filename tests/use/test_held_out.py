"""The held-out loss is transformers' own, over the tokens that training supervises."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.runs import adapt_values, run_values, train, write_conversations, write_corpus
from tests.support.models import STORIES
from trivium.engine.runfolder import RunFolder
from trivium.errors import BadData, ConfigError
from trivium.use import held_out
from trivium.use.held_out import Passage, measure, passages_of_file, passages_of_run
from trivium.use.load import load


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_measure_equals_the_loss_of_transformers(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(held_out, "BATCH_TOKENS", 150)
    monkeypatch.setattr(held_out, "HEAD_ROWS", 16)
    loaded = load(str(adapter))
    passages = passages_of_file(write_texts(tmp_path / "texts.jsonl", STORIES), loaded.tokenizer, seq_len=1024)
    seen: list[tuple[int, int]] = []
    found = measure(loaded, passages, lambda *done: seen.append(done))
    total = num_tokens = 0.0
    for text in STORIES:
        ids = torch.tensor([[*loaded.tokenizer(text).input_ids, 256]])
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
    assert found.num_tokens == num_tokens
    assert found.loss == pytest.approx(total / num_tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert seen[-1] == (3, 3) and len(seen) > 1


def test_measure_respects_masks_and_weights(adapter: Path):
    loaded = load(str(adapter))
    rng = np.random.default_rng(0)
    passages = []
    for length in (30, 7, 19):
        ids = rng.integers(0, 256, length)
        labels = np.where(rng.random(length) < 0.5, np.append(ids[1:], 256), -100)
        passages.append(Passage(ids, labels, rng.choice([0.5, 1.0, 2.0], length).astype(np.float32)))
    losses = weights = 0.0
    for passage in passages:
        # Stock labels are shifted inside the model: a token is the label of the place before it.
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.from_numpy(passage.ids)[None]).logits[0]
        for place, label in enumerate(passage.labels):
            if label != -100:
                losses += float(passage.weights[place] * -logits[place].log_softmax(-1)[label])
                weights += float(passage.weights[place])
    found = measure(loaded, passages)
    assert found.loss == pytest.approx(losses / weights, abs=1e-5)
    assert found.num_tokens == sum((passage.labels != -100).sum() for passage in passages)


def test_a_long_document_is_read_in_pieces_and_no_label_is_lost(base: Path, tmp_path: Path):
    loaded = load(str(base))
    path = write_texts(tmp_path / "long.jsonl", ["".join(STORIES), STORIES[0]])
    passages = passages_of_file(path, loaded.tokenizer, seq_len=16)
    assert max(len(passage.ids) for passage in passages) == 16
    num_bytes = len("".join(STORIES)) + len(STORIES[0])
    assert measure(loaded, passages).num_tokens == num_bytes  # one label a byte, and the end tokens less the firsts


def test_bits_per_byte_are_the_losses_over_the_bytes(base: Path, tmp_path: Path):
    loaded = load(str(base))
    found = measure(loaded, passages_of_file(write_texts(tmp_path / "t.jsonl", STORIES), loaded.tokenizer, 1024))
    num_bytes = sum(len(story) - 1 for story in STORIES)
    assert found.bits_per_byte == pytest.approx(found.loss * found.num_tokens / math.log(2) / num_bytes)


def test_a_runs_own_held_out_set_gives_the_loss_it_recorded(tmp_path: Path):
    values = run_values(write_corpus(tmp_path / "stories.jsonl"), tmp_path / "runs")
    train(values)
    folder = RunFolder(tmp_path / "runs" / "small")
    recorded = [line for line in folder.metrics if "eval/loss" in line][-1]
    loaded = load(str(folder.path))
    found = measure(loaded, passages_of_run(folder.path, lambda text: None))
    assert found.num_tokens == recorded["eval/num_tokens"]
    assert found.loss == pytest.approx(recorded["eval/loss"], abs=1e-4)
    values["data"]["held_out"] = 0.0
    train({**values, "name": "all"})
    with pytest.raises(ConfigError, match="no held-out documents"):
        passages_of_run(tmp_path / "runs" / "all", lambda text: None)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_tuned_runs_own_held_out_set_gives_the_loss_it_recorded(method: str, base: Path, tmp_path: Path):
    adapter = {} if method == "full" else {"adapter": {"rank": 4, "train_tokens": ["<|im_end|>"]}}
    values = {"method": method, "budget": {"steps": 6}, **adapter}
    train(adapt_values(base, write_conversations(tmp_path / "questions.jsonl"), tmp_path / "runs", **values))
    folder = RunFolder(tmp_path / "runs" / "small")
    recorded = [line for line in folder.metrics if "eval/loss" in line]
    loaded = load(str(folder.path), nf4=method == "qlora")
    passages = passages_of_run(folder.path, lambda text: None)
    found = measure(loaded, passages)
    assert found.num_tokens == recorded[-1]["eval/num_tokens"]
    assert found.loss == pytest.approx(recorded[-1]["eval/loss"], abs=2e-3)
    before = measure(load(str(base)), passages).loss
    assert method == "qlora" or before == pytest.approx(recorded[0]["eval/loss"], abs=1e-4)
    assert found.loss < before - 0.01
    assert loaded.converses


def test_measure_supervises_answers_and_their_ends(adapter: Path, tmp_path: Path):
    loaded = load(str(adapter))
    turns = [("user", "Who?"), ("assistant", "The fox."), ("user", "Where?"), ("assistant", "Here.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    broken = {"messages": messages[:1]}
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(broken) + "\n")
    said: list[str] = []
    found = measure(loaded, passages_of_file(tmp_path / "chat.jsonl", loaded.tokenizer, 256, said.append))
    assert said == [f"{tmp_path / 'chat.jsonl'}: left out 1 rejected record"]
    losses = []
    for index in (1, 3):
        prompt = loaded.tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        start = loaded.tokenizer(prompt).input_ids
        ids = torch.tensor([start + loaded.tokenizer(messages[index]["content"] + "<|im_end|>").input_ids])
        labels = torch.where(torch.arange(ids.shape[1])[None] < len(start), -100, ids)
        with torch.no_grad():
            losses.append((float(loaded.model(input_ids=ids, labels=labels).loss), ids.shape[1] - len(start)))
    num_tokens = sum(number for _, number in losses)
    assert found.num_tokens == num_tokens == len("The fox.") + len("Here.") + 2
    assert found.loss == pytest.approx(sum(loss * number for loss, number in losses) / num_tokens, abs=1e-5)


def test_passages_of_file_refuses_an_empty_file(base: Path, tmp_path: Path):
    loaded = load(str(base))
    with pytest.raises((BadData, ConfigError)):
        passages_of_file(write_texts(tmp_path / "empty.jsonl", [""]), loaded.tokenizer, 64)
    with pytest.raises(ConfigError, match="no such file"):
        passages_of_file(tmp_path / "gone.jsonl", loaded.tokenizer, 64)
