"""Answers in padded batches are those that transformers gives one at a time; scores count what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import PAIRS
from trivium.errors import BadData, ConfigError
from trivium.use import answers as module
from trivium.use.answers import (
    EvalPrompt,
    ModelAnswer,
    answers,
    is_json,
    question_of,
    read_questions,
    score,
    split_reasoning,
)
from trivium.use.load import load


def ask(text: str, answer: str | None = None) -> EvalPrompt:
    return EvalPrompt([{"role": "user", "content": text}], answer)


def test_answers_in_batches_equal_transformers_one_by_one(adapter: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 3)
    loaded = load(str(adapter))
    questions = [ask("x" * length) for length in (5, 1, 40, 17, 2, 9, 30)]
    seen: list[tuple[int, int]] = []
    found = answers(loaded, questions, max_new_tokens=12, every=lambda *done: seen.append(done))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    for question, answer in zip(questions, found, strict=True):
        text = loaded.tokenizer.apply_chat_template(question.turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([loaded.tokenizer(text).input_ids])
        (output,) = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        ).tolist()
        new = output[ids.shape[1] :]
        assert answer.text == loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.stopped == (new[-1] in (256, 258)) and answer.num_tokens == len(new)


def test_answers_of_a_trained_model_match_and_stop(taught: Path, base: Path):
    questions = [ask(question, answer) for question, answer in PAIRS]
    given_answers = answers(load(str(taught)), questions, max_new_tokens=30)
    assert [answer.text for answer in given_answers] == [answer for _, answer in PAIRS]
    scores = score(questions, given_answers)
    assert (scores.exact_match, scores.json_valid, scores.stop_rate) == (1.0, 1.0, 1.0)
    shortened = score(questions, answers(load(str(taught)), questions, max_new_tokens=4))
    assert (shortened.exact_match, shortened.json_valid, shortened.stop_rate) == (0.0, 0.0, 0.0)
    plain = answers(load(str(base)), questions, as_chat=True, max_new_tokens=8)
    assert score(questions, plain).exact_match == 0.0


def test_answers_ignore_generation_config(tmp_path: Path, taught: Path):
    import shutil

    folder = tmp_path / "penalised"
    shutil.copytree(taught, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(own | {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "max_length": 10})
    )
    questions = [ask(question, answer) for question, answer in PAIRS]
    assert score(questions, answers(load(str(folder)), questions, max_new_tokens=30)).exact_match == 1.0


def test_answers_without_a_template_complete_the_text(base: Path):
    loaded = load(str(base))
    (answer,) = answers(loaded, [ask("Lily")], max_new_tokens=5)
    ids = loaded.tokenizer("Lily", return_tensors="pt", return_token_type_ids=False)
    output = loaded.model.generate(**ids, do_sample=False, max_new_tokens=5)[0, 4:]
    assert answer.text == loaded.tokenizer.decode(output, skip_special_tokens=True)
    with pytest.raises(ConfigError, match="no usable chat template"):
        answers(replace(loaded, template=None), [ask("Lily")], as_chat=True)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", " a ", '{"a": 1}', "[", None]),
            st.sampled_from(["a", "a\n", "b", '{"a": 1}', " [1]", ""]),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=60)
def test_score(rows: list[tuple[str | None, str, bool]]):
    questions = [ask("?", expected) for expected, _, _ in rows]
    found = score(questions, [ModelAnswer(text, "", stopped, 1) for _, text, stopped in rows])
    known = [(expected, text) for expected, text, _ in rows if expected is not None]
    wanting = [text for expected, text in known if expected == '{"a": 1}']
    exact = [expected.strip() == text.strip() for expected, text in known]
    assert found.exact_match == (sum(exact) / len(exact) if exact else None)
    valid = [text.strip()[:1] in ("{", "[") and len(text) > 1 for text in wanting]
    assert found.json_valid == (sum(valid) / len(valid) if valid else None)
    assert found.stop_rate == sum(stopped for _, _, stopped in rows) / len(rows)


def test_is_json():
    assert is_json('{"a": [1]}') and is_json(" []\n")
    assert not any(map(is_json, ("42", '"a"', "{'a': 1}", '{"a": 1} ok', "", "[" * 100_000)))


@pytest.mark.parametrize(
    ("written", "reasoning", "answer"),
    [
        ("plain", "", "plain"),
        ("<think>\nwhy\n</think>\n\nso", "why", "so"),
        ("why\n</think>\n\nso", "why", "so"),
        ("<think>\n\n</think>\n\nso", "", "so"),
        ("<think>\nnever ends", "never ends", ""),
    ],
)
def test_split_reasoning(written: str, reasoning: str, answer: str):
    assert split_reasoning(written) == (reasoning, answer)


def test_question_of_records():
    row = {"system": "Be short.", "prompt": "Who?", "answer": "I."}
    question = question_of(row)
    assert [turn["role"] for turn in question.turns] == ["system", "user"] and question.answer == "I."
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<think>hm</think>I."}]
    assert question_of({"messages": turns}) == EvalPrompt(turns[:1], "I.")
    assert question_of({"messages": turns[:1]}).answer is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "list instead of an object"),
        ('{"answer": "x"}', "prompt is missing"),
        ('{"prompt": "x", "answer": 3}', "answer and system must be text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must end with"),
        ('{"messages": "x"}', "not a list of objects"),
    ],
)
def test_read_questions_names_file_and_line(line: str, words: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(BadData, match="prompts.jsonl:3: ") as refused:
        read_questions(path)
    assert words in str(refused.value)


def test_read_questions_of_a_text_file(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("\ufeffWho?\n\n Where? \n", encoding="utf-8")
    assert [question.text for question in read_questions(tmp_path / "prompts.txt")] == ["Who?", "Where?"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadData, match="contains no prompt"):
        read_questions(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="does not exist"):
        read_questions(tmp_path / "gone.jsonl")


def test_prompt_text_refuses_messages_the_template_cannot_render(taught: Path):
    with pytest.raises(BadData, match="cannot render"):
        answers(load(str(taught)), [EvalPrompt([{"role": "user", "content": None}])])
