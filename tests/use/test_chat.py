"""A conversation is sent as serving sends it, and a saved one trains as it is."""

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import PAIRS
from tests.support.qwen_tokenizers import REAL, needs_real
from trivium.data.chat.formats import parse
from trivium.data.chat.layout import RecordLayout
from trivium.data.chat.samples import ChatEncoder
from trivium.data.tokenizer import load_tokenizer
from trivium.errors import ConfigError
from trivium.use.chat import Dialogue, Writer
from trivium.use.load import load


def test_say_streams_answers_and_extends_the_conversation(taught: Path):
    writer = Writer(load(str(taught)), max_new_tokens=30, temperature=0.0)
    dialogue = Dialogue(writer)
    pieces = list(dialogue.say(PAIRS[0][0]))
    assert "".join(pieces) == PAIRS[0][1] and len([piece for piece in pieces if piece]) > 1
    assert writer.is_whole
    assert dialogue.turns == [
        {"role": "user", "content": PAIRS[0][0]},
        {"role": "assistant", "content": PAIRS[0][1]},
    ]
    again = "".join(dialogue.retry())
    assert again == PAIRS[0][1] and len(dialogue.turns) == 2
    dialogue.system = "Be short."
    assert [turn["role"] for turn in dialogue.messages] == ["system", "user", "assistant"]


def test_closing_early_stops_the_generation_and_keeps_the_text(base: Path):
    # At temperature 0 this model repeats a token without end, so that only leaving can stop it.
    writer = Writer(load(str(base)), max_new_tokens=100_000, temperature=0.0)
    dialogue = Dialogue(writer)
    pieces = dialogue.say("Lily")
    came = "".join(piece for _, piece in zip(range(20), pieces, strict=False))
    pieces.close()  # waits for the thread that generates
    assert not writer.is_whole
    assert dialogue.turns[-1]["role"] == "assistant" and dialogue.turns[-1]["train"] is False
    assert came.startswith(dialogue.turns[-1]["content"]) or dialogue.turns[-1]["content"].startswith(came)


def test_the_same_seed_says_the_same_and_temperature_zero_is_greedy(base: Path):
    loaded = load(str(base))
    said = []
    for _ in range(2):
        torch.manual_seed(5)
        said.append("".join(Writer(loaded, 20, 1.0).write("Lily")))
    assert said[0] == said[1]
    inputs = loaded.tokenizer("Lily", return_tensors="pt", return_token_type_ids=False)
    output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=20)
    expected = loaded.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert "".join(Writer(loaded, 20, 0.0).write("Lily")) == expected


def test_retry_and_save_refuse_an_empty_conversation(base: Path, tmp_path: Path):
    dialogue = Dialogue(Writer(load(str(base)), 3, 0.0))
    with pytest.raises(ConfigError, match="There is no message"):
        list(dialogue.retry())
    list(dialogue.say("Lily"))
    with pytest.raises(ConfigError, match="No answer is complete"):
        dialogue.save(tmp_path / "saved.jsonl")
    assert not (tmp_path / "saved.jsonl").exists()


class Scripted(Writer):
    """A writer that says what it is told to, and remembers what it was asked."""

    def __init__(self, loaded, answers: list[tuple[str, bool]]) -> None:
        super().__init__(loaded, 10, 0.0)
        self.answers = list(answers)
        self.prompts: list[str] = []

    def write(self, prompt: str) -> Generator[str]:
        self.prompts.append(prompt)
        text, self.is_whole = self.answers.pop(0)
        yield from (text[:3], text[3:])


def supervised_answers(path: Path, tokenizer) -> list[tuple[str, str]]:
    """(prompt, answer) of everything that training would learn from a file, as text."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        conversation = parse(json.loads(line), RecordLayout("messages"))
        for sample in ChatEncoder(tokenizer, seq_len=4096).encode(conversation).samples:
            ids = sample.ids.tolist()
            for answer in sample.answers:
                found.append((tokenizer.decode(ids[: answer.start]), tokenizer.decode(ids[answer.start : answer.stop])))
    return found


def test_save_leaves_cut_off_answers_unsupervised(taught: Path, tmp_path: Path):
    loaded = load(str(taught))
    answers = [("One.", True), ("", True), ("Cut o", False), ("Two.", True)]
    dialogue = Dialogue(writer := Scripted(loaded, answers), system="Be short.")
    for question in ("First?", "Silence?", "Cut?", "Second?", "Unanswered?")[:4]:
        list(dialogue.say(question))
    dialogue.turns.append({"role": "user", "content": "Unanswered?"})
    for _ in range(2):
        dialogue.save(tmp_path / "saved.jsonl")
    first, second = supervised_answers(tmp_path / "saved.jsonl", loaded.tokenizer)[:2]
    assert first == (writer.prompts[0], "One.<|im_end|>")
    assert second[1] == "Two.<|im_end|>" and "Cut o<|im_end|>" in second[0] and "Silence" not in second[0]
    assert len((tmp_path / "saved.jsonl").read_text().splitlines()) == 2
    assert len(supervised_answers(tmp_path / "saved.jsonl", loaded.tokenizer)) == 4


@needs_real
@pytest.mark.parametrize("thinking", [None, True, False])
def test_reasoning_is_saved_so_that_training_sees_what_serving_sent(thinking, taught: Path, tmp_path: Path):
    tokenizer = load_tokenizer(REAL / "qwen3")
    loaded = replace(load(str(taught)), tokenizer=tokenizer)
    written = "So." if thinking is False else "<think>\nWhy\nnot?\n</think>\n\nSo."
    dialogue = Dialogue(writer := Scripted(loaded, [(written, True), (written, True)]), thinking=thinking)
    list(dialogue.say("First?"))
    list(dialogue.say("Second?"))
    dialogue.save(tmp_path / "saved.jsonl")
    assert supervised_answers(tmp_path / "saved.jsonl", tokenizer) == [
        (prompt, written + "<|im_end|>") for prompt in writer.prompts
    ]
