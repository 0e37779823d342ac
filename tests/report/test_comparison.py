"""The page of a comparison: self-contained, safe, right in its figures, and marking where answers part."""

import json
import re
from dataclasses import replace
from pathlib import Path

import click
import pytest

from trivium.report.comparison import TableRow, as_text, table, write_comparison
from trivium.use.answers import EvalPrompt, ModelAnswer, Scores
from trivium.use.compare import ComparedModel, Comparison
from trivium.use.held_out import HeldOut

from .test_report import read


def held_out(loss: float) -> HeldOut:
    return HeldOut(loss, 2.718**loss, loss / 3, 1000)


def answer(text: str, stopped: bool = True) -> ModelAnswer:
    return ModelAnswer(text, "", stopped, len(text))


@pytest.fixture
def compared() -> Comparison:
    """A base and two runs of it, of which one is better and one cheaper."""
    base = ComparedModel("base", None, None, "/models/base", 4_000_000, held_out=held_out(3.0), general=held_out(2.0))
    lora = ComparedModel(
        "lora", "base", "lora", "runs/lora/adapter", 80_000, 16_512, 61.25, 5_765.4, 0.43, held_out(1.5), held_out(2.25)
    )
    full = replace(lora, name="full", method="full", num_trained_params=94_592, held_out=held_out(1.25))
    base = replace(base, scores=Scores(2, 0.0, None, 0.5), answers=[answer("The hen went away.", False), answer("no")])
    lora = replace(lora, scores=Scores(2, 0.5, None, 1.0), answers=[answer("The hen sang."), answer("<b>yes</b>")])
    full = replace(full, scores=Scores(2, 0.5, None, 1.0), answers=[answer("The"), answer("<script>alert(1)</script>")])
    questions = [
        EvalPrompt([{"role": "user", "content": "What did the hen do?"}], "The hen sang."),
        EvalPrompt([{"role": "system", "content": "Be <short>."}, {"role": "user", "content": "Is it?"}], None),
    ]
    return Comparison([base, lora, full], questions, "what lora held out", "general.jsonl", True, ["A note & a half."])


def text_of(path: Path) -> str:
    return " ".join(read(path).text.split())


def test_table_has_every_metric_and_the_best_value(compared: Comparison):
    rows = {row.label: row for row in table(compared)}
    assert list(rows) == [
        "held-out loss", "exact match", "stop rate", "general loss", "increase in general loss",
        "parameters trained", "training time", "tokens/s", "peak memory, GiB", "size on disk",
    ]  # fmt: skip
    assert [rows["held-out loss"].text(value) for value in rows["held-out loss"].values] == [
        "3.0000",
        "1.5000",
        "1.2500",
    ]
    assert rows["held-out loss"].best == 1.25 and rows["exact match"].best == 0.5
    assert (
        rows["increase in general loss"].values == [None, 0.25, 0.25] and rows["increase in general loss"].best is None
    )
    assert [rows["training time"].text(value) for value in rows["training time"].values] == [
        "-",
        "61 s",
        "61 s",
    ]
    assert rows["size on disk"].text(4_000_000) == "3.8 MiB" and rows["size on disk"].text(80_000) == "78.1 KiB"
    assert rows["parameters trained"].best is None
    other = {row.label for row in table(replace(compared, same_tokenizer=False))}
    assert other - set(rows) == {"held-out bits per byte"}


def test_table_row_without_a_best_value():
    assert TableRow("Quality", "stop rate", [1.0, 1.0, None], "{:.1%}", "high").best is None
    assert TableRow("Quality", "stop rate", [None], "{:.1%}", "high").best is None


def test_text_in_parts_keeps_names_whole(compared: Comparison):
    """80 columns are too few for six models, and no line is for the terminal to break."""
    models = [replace(model, name=f"runs/experiment-{n}") for n, model in enumerate(2 * compared.models)]
    many = replace(compared, models=models)
    whole, narrow = as_text(many), as_text(many, 80)
    lines = [line for line in click.unstyle(narrow).splitlines() if line]
    assert max(map(len, lines)) <= 80 < max(map(len, click.unstyle(whole).splitlines()))
    assert all(f" {model.name}" in click.unstyle(narrow) for model in models)
    rows = {line[:25].strip(): [] for line in lines}
    for line in lines:
        rows[line[:25].strip()] += re.split(r"\s{2,}", line[25:].strip())
    assert rows["held-out loss"] == ["3.0000", "1.5000", "1.2500"] * 2
    assert as_text(many, 1).count("held-out loss") == 6 and as_text(compared, 80) == as_text(compared)


def test_page_is_self_contained_and_escapes_answers(compared: Comparison, tmp_path: Path):
    path = write_comparison(compared, tmp_path / "new" / "place")
    page = read(path)
    text = " ".join(page.text.split())
    for words in ("lora, full and base model", "base model", "A note & a half.", "94,592", "50.0%"):
        assert words in text
    assert "<script>alert(1)</script>" in text and "Be <short>." in text  # as words, not as tags
    assert page.tags.count("table") == 1 and page.tags.count("blockquote") == 7
    stored = json.loads((tmp_path / "new" / "place" / "comparison.json").read_text())
    assert [model["forgotten"] for model in stored["models"]] == [None, 0.25, 0.25]
    assert stored["models"][1]["answers"][0]["text"] == "The hen sang."


def test_the_first_difference_is_marked_and_the_same_is_not(compared: Comparison, tmp_path: Path):
    html = write_comparison(compared, tmp_path).read_text(encoding="utf-8")
    quotes = re.findall(r"<blockquote>(.*?)</blockquote>", html, flags=re.DOTALL)
    assert quotes == [
        "The hen sang.",
        "The hen <mark>went</mark> away.",
        "The hen sang.",
        "The<mark>&hellip;</mark>",
        "no",
        "<mark>&lt;b&gt;yes&lt;/b&gt;</mark>",
        "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>",
    ]
    assert html.count('<span class="right">exact</span>') == 1 and html.count("<span>cut off</span>") == 1


def test_page_is_reproducible_and_exists_without_prompts(compared: Comparison, tmp_path: Path):
    assert write_comparison(compared, tmp_path).read_bytes() == write_comparison(compared, tmp_path).read_bytes()
    alone = ComparedModel("alone", None, None, "/models/alone", 1000)
    text = text_of(write_comparison(Comparison([alone], [], None, None, True, []), tmp_path))
    assert "alone" in text and "Answers" not in text and "base" not in text


def test_many_prompts_are_in_the_file_and_the_first_of_them_on_the_page(compared: Comparison, tmp_path: Path):
    many = replace(
        compared,
        questions=compared.questions[:1] * 30,
        models=[replace(model, answers=model.answers[:1] * 30) for model in compared.models],
    )
    path = write_comparison(many, tmp_path)
    assert "comparison.json has 10 more prompts" in text_of(path)
    assert len(json.loads((tmp_path / "comparison.json").read_text())["models"][0]["answers"]) == 30
