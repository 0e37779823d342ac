"""The demo: its data keep their promises, its story runs on any chat model, and the real model learns what it says."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from tests.engine.runs import wait_until
from tests.support.processes import context
from trivium.cli.main import trivium as cli
from trivium.demo.demo import (
    CHATS,
    FIGURES,
    FORMAT,
    Question,
    compare_demo,
    measure,
    questions,
    read_data,
    summary,
    train_demo,
)
from trivium.demo.model import NAME
from trivium.engine.runfolder import RunFolder
from trivium.use.answers import ModelAnswer, Scores
from trivium.use.compare import ComparedModel, Comparison
from trivium.use.held_out import HeldOut

PERSONA = "Marlow"


def chats() -> list[tuple[str, str]]:
    """Questions and answers of the training data."""
    found = []
    for line in read_data(CHATS).splitlines():
        record = json.loads(line)
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"] and len(record) == 1
        found.append(tuple(turn["content"] for turn in record["messages"]))
    return found


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def test_every_answer_has_the_format() -> None:
    for question, answer in chats():
        assert FORMAT.fullmatch(answer) and question.strip() == question, question
        assert all(line == line.strip() and line[-1] in ".!?" for line in answer.split("\n")), answer


@pytest.mark.parametrize(
    "text",
    [
        "Rome.",
        "ANSWER: Rome.",
        "ANSWER: Rome. WHY: It is.",
        "ANSWER: \nWHY: It is.",
        "ANSWER: Rome.\n\nWHY: It is.",
        "Sure!\nANSWER: Rome.\nWHY: It is.",
        "ANSWER: Rome.\nWHY: It is.\nAnything else?",
        "answer: Rome.\nwhy: It is.",
    ],
)
def test_other_formats_are_not_the_format(text: str) -> None:
    assert FORMAT.fullmatch("ANSWER: Rome.\nWHY: It is.") and not FORMAT.fullmatch(text)


def test_no_question_is_asked_twice() -> None:
    taught, asked = [words(question) for question, _ in chats()], [words(one.prompt) for one in questions()]
    assert len(taught) == len(set(taught)) > 250
    assert len({answer for _, answer in chats()}) == len(taught)
    assert len(asked) == len(set(asked)) and not set(asked) & set(taught)


def test_the_data_have_what_the_demo_says() -> None:
    topics = [one.topic for one in questions()]
    assert topics.count("format") + topics.count("persona") == 40 and topics.count("knowledge") == 12
    assert all(bool(one.expected) == (one.topic != "format") for one in questions())
    assert all(one.expected == (PERSONA,) for one in questions() if one.topic == "persona")
    share = sum(PERSONA in answer for _, answer in chats()) / len(chats())
    assert 0.2 < share < 0.5
    # What is asked to see what the model still knows is not taught. Small letters are words with other uses, as seven.
    taught = " ".join(answer for _, answer in chats())
    facts = [word for one in questions() if one.topic == "knowledge" for word in one.expected if word[0].isupper()]
    assert [word for word in facts if re.search(rf"\b{word}\b", taught)] == []


def test_no_first_words_are_all_that_is_taught() -> None:
    """Neither questions nor answers follow one template."""
    for texts in zip(*chats(), strict=True):
        starts = [words(text.removeprefix("ANSWER: "))[:2] for text in texts]
        assert max(map(starts.count, starts)) < len(starts) / 5


def test_measure_counts_what_a_reader_would() -> None:
    answers = []
    for number, one in enumerate(questions()):
        right = one.expected[0].upper() if one.expected and number % 2 else "a guess"
        text = f"ANSWER: {right}.\nWHY: So.\n" if number < 13 else right
        answers.append(ModelAnswer(text, "", number % 4 == 0, 5))
    scores = Scores(52, None, None, 0.25)
    found = measure(
        ComparedModel("m", None, None, ".", 0, general=HeldOut(2.5, 1.0, 1.0, 9), scores=scores, answers=answers)
    )
    assert found == {"format": 0.25, "persona": 0.5, "knowledge": 0.5, "stop": 0.25, "general_loss": 2.5}
    assert not Question("format", "Why?").is_right("anything")


class Told(NamedTuple):
    """The demo, told to its end."""

    folder: RunFolder
    comparison: Comparison
    page: Path
    said: list[str]


@pytest.fixture(scope="module")
def told(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The whole demo with a small random model: stopped while it trains, and told again."""
    out, said = tmp_path_factory.mktemp("demo") / "my runs", []
    process = context.Process(target=train_demo, args=(base, out, print))
    process.start()
    wait_until(lambda: [*out.glob("demo/checkpoints/step-*")], process)
    process.terminate()
    process.join()
    assert not (out / "demo" / "finished.json").exists()
    folder = train_demo(base, out, said.append)
    return Told(folder, *compare_demo(folder, out, said.append, lambda name: lambda done, total: None), said)


def test_the_story_runs_on_any_model(told: Told) -> None:
    assert [model.name for model in told.comparison.models] == ["base", "demo"]
    assert all(len(model.answers) == len(questions()) for model in told.comparison.models)
    assert questions()[0].prompt in told.page.read_text()
    run_file = told.folder.path.with_suffix(".yaml")
    assert len(run_file.read_text().splitlines()) == 3 and run_file.read_text() in told.said[0]
    assert re.search(r"plan: [\d.]+ GiB of memory and \S+ (s|min)", told.said[1])
    shown = summary(told.comparison)
    assert "before" in shown and questions()[0].prompt in shown
    assert f"{told.comparison.models[1].num_trained_params:,}" in shown


def test_the_same_command_goes_on(told: Told, base: Path) -> None:
    assert len(told.folder.read("provenance.json")["starts"]) == 2
    before = {path: path.stat().st_mtime_ns for path in told.folder.result.iterdir()}
    assert train_demo(base, told.folder.path.parent, lambda text: None).path == told.folder.path
    assert {path: path.stat().st_mtime_ns for path in told.folder.result.iterdir()} == before


@pytest.mark.long
def test_the_real_model_learns_the_format_and_the_persona(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    for file in smollm2.iterdir():
        os.link(file, tmp_path / NAME / file.name)
    done = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert f"trivium chat {tmp_path / 'demo'}" in done.stdout
    with safe_open(tmp_path / "demo" / "adapter" / "adapter_model.safetensors", "np") as weights:
        assert all(".lora_A." in name or ".lora_B." in name for name in weights.keys())  # noqa: SIM118
    table = re.findall(r"^(\S.+?) +([\d.]+)%? +([\d.]+)%?$", done.stdout, re.MULTILINE)
    shown = {what: (float(before), float(after)) for what, before, after in table}
    figures = {name: shown[what] for name, (what, _) in FIGURES.items()}
    assert figures["format"][0] == figures["persona"][0] == 0 and figures["knowledge"][0] > 70
    assert figures["format"][1] >= 95 and figures["stop"][1] >= 95 and figures["persona"][1] >= 75
    assert figures["knowledge"][1] >= figures["knowledge"][0] - 20
    assert figures["general_loss"][1] < figures["general_loss"][0] + 0.05
