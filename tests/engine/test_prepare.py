"""Preparing a run: reasoning shares, stop tokens, selections and the digest of inputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.engine.runs import adapt_values, run_values, write_conversations, write_corpus
from tests.support.models import END_OF_TEXT, byte_tokenizer, write_base
from trivium.config.run import Run, with_method_defaults
from trivium.data.columns import loss_weights
from trivium.data.store.megatron import Selection, Store
from trivium.engine.loop import Silent
from trivium.engine.prepare import Job, prepare
from trivium.engine.provenance import reasons_for_no_held_out
from trivium.errors import ConfigError

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}
{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    byte_tokenizer(folder / "tokenizer", TEMPLATE)
    return write_base(folder / "model", folder / "tokenizer", [END_OF_TEXT])


def write_mixed(path: Path, num_reasoned: int, num_plain: int) -> Path:
    rows = []
    for number in range(num_reasoned + num_plain):
        answer = {"role": "assistant", "content": f"answer {number}"}
        if number < num_reasoned:
            answer["reasoning_content"] = "because " * 3
        rows.append({"messages": [{"role": "user", "content": f"question {number}"}, answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(base: Path, data: Path, folder: Path, **changes) -> Job:
    values = adapt_values(base, data, folder, method="lora")
    values["data"] |= changes
    return prepare(Run.model_validate(with_method_defaults(values)), Silent().note)


def test_reasoning_share_is_met(base, tmp_path):
    data = write_mixed(tmp_path / "mixed.jsonl", num_reasoned=30, num_plain=300)
    job = prepared(base, data, tmp_path, reasoning_share=0.75)
    assert [part.kind for part in job.mixture] == ["reasoning", "plain"]
    order, tokens = job.batches.order, np.zeros(2)
    for row in range(order.num_sequences(0)):
        for source, document, start, stop in order.sequence(row).tolist():
            tokens[source] += stop - start
            text = job.tokenizer.decode(job.mixture[source].store.tokens(document, start, stop))
            assert ("<think>" in text) == (source == 0)
    assert tokens[0] / tokens.sum() == pytest.approx(0.75, abs=0.05)


def test_reasoning_share_without_reasoning_samples_is_refused(base, tmp_path):
    data = write_mixed(tmp_path / "plain.jsonl", num_reasoned=0, num_plain=20)
    with pytest.raises(ConfigError, match="has no samples with reasoning"):
        prepared(base, data, tmp_path, reasoning_share=0.75)


def test_stop_ids_begin_with_the_end_of_turn_for_conversations(base, tmp_path):
    job = prepared(base, write_conversations(tmp_path / "talk.jsonl"), tmp_path)
    assert job.tokenizer.convert_ids_to_tokens(job.stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert job.batches.order.whole


def test_selection_holds_the_documents_it_names(base, tmp_path):
    job = prepared(base, write_conversations(tmp_path / "talk.jsonl"), tmp_path)
    store = job.built[0].open()
    chosen = Selection(store, np.array([7, 2, 5]))
    for place, document in enumerate((7, 2, 5)):
        assert chosen.lengths[place] == store.lengths[document]
        assert chosen.tokens(place, 1, 4).tolist() == store.tokens(document, 1, 4).tolist()
        assert loss_weights(chosen, place, 0, 9).tolist() == loss_weights(store, document, 0, 9).tolist()
    assert isinstance(store, Store)


def test_inputs_digest_changes_with_the_template(base, tmp_path):
    data = write_conversations(tmp_path / "talk.jsonl")
    before = prepared(base, data, tmp_path).inputs
    template = base / "chat_template.jinja"
    original = template.read_text()
    template.write_text(original.replace("<|im_end|>\\n", "<|im_end|>\\n\\n"))
    try:
        assert prepared(base, data, tmp_path).inputs != before
    finally:
        template.write_text(original)


def test_training_a_tokenizer_is_said_only_when_it_is_done(tmp_path):
    """A resumed run uses the same tokenizer, and says so by saying nothing."""
    run = Run.model_validate(with_method_defaults(run_values(write_corpus(tmp_path / "stories.jsonl"), tmp_path)))
    for times in ([1], [1, 0]):
        said: list[str] = []
        prepare(run, said.append)
        assert sum("training a byte tokenizer of 259 tokens" in line for line in said) == times[-1]


@pytest.mark.parametrize(
    ("num_copies", "held_out", "reason"),
    [
        (20, 0.1, "copies.jsonl has only one distinct document, 20 times; copies of a document are never held out"),
        (20, 0.0, "data.held_out is 0"),
    ],
)
def test_the_reason_for_an_empty_held_out_set_is_true(num_copies: int, held_out: float, reason: str, base, tmp_path):
    turns = [{"role": "user", "content": "the only"}, {"role": "assistant", "content": "one"}]
    data = tmp_path / "copies.jsonl"
    data.write_text((json.dumps({"messages": turns}) + "\n") * num_copies)
    job = prepared(base, data, tmp_path, held_out=held_out)
    (found,) = reasons_for_no_held_out(job)
    assert not job.held_out and reason in found and "text file" not in found
