"""Rules about token ids: provoked by data, models and tokenizers that break them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from tests.doctor.cases import MACHINE, found_in, prepared_of, run_of, severity_of
from tests.support.models import END_OF_TEXT, TURN_END, TURN_START, byte_tokenizer, write_base, zero_rows
from trivium.data.columns import LOSS_WEIGHTS
from trivium.data.store.megatron import StoreWriter
from trivium.data.tokenizer import CHATML_TEMPLATE
from trivium.doctor.prepared import load
from trivium.engine.build import build_engine
from trivium.errors import BadData
from trivium.model import hf

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def prepared(base, chats, tmp_path_factory):
    return prepared_of(run_of(tmp_path_factory.mktemp("run"), chats, method="lora", model=str(base)))


def write_store(prefix, documents, dtype=np.uint16, weights=None):
    """A store in Megatron's format, as another tool would leave it, with loss weights if they are given."""
    lengths = np.array([len(document) for document in documents])
    columns = {} if weights is None else {LOSS_WEIGHTS.name: np.concatenate(weights).astype(np.uint8)}
    with StoreWriter(prefix, np.dtype(dtype), [LOSS_WEIGHTS] if columns else []) as writer:
        writer.add(np.concatenate(documents).astype(dtype), lengths, columns)
    return [{"store": str(prefix)}]


def ready_run(tmp_path, base, documents, weights=None, method="continue", **values):
    sources = write_store(tmp_path / "ready", documents, weights=weights)
    return prepared_of(run_of(tmp_path, sources, method=method, model=str(base), **values))


def ids_of(text):
    """The tokens of a text without control tokens; `bytes` tokenizers number the byte alphabet."""
    return [BYTES.index(letter) for letter in text.replace("\n", "\u010a").replace(" ", "\u0120")]


def chat_ids(question="hi", answer="yes", before="assistant"):
    """A conversation in ChatML, and the weights that learn its answer."""
    asked = [TURN_START, *ids_of(f"user\n{question}"), TURN_END, *ids_of("\n")]
    prompt = [*asked, TURN_START, *ids_of(f"{before}\n")]
    ids = [*prompt, *ids_of(answer), TURN_END]
    return np.array(ids), np.array([0] * len(prompt) + [100] * (len(ids) - len(prompt)))


def test_q02_documents_without_an_end(tmp_path, base):
    documents = [np.array(ids_of("a text that goes on and on"))] * 9
    found = found_in(ready_run(tmp_path, base, documents))["Q02"]
    assert found.severity == "warning" and "--append-eod" in found.fix
    ended = [np.append(document, END_OF_TEXT) for document in documents]
    (tmp_path / "ended").mkdir()
    assert severity_of(ready_run(tmp_path / "ended", base, ended), "Q02") is None


def test_q02_answers_without_a_supervised_end(tmp_path, base):
    ids, weights = chat_ids()
    sound = ready_run(tmp_path, base, [ids] * 9, [weights] * 9, method="full")
    assert severity_of(sound, "Q02") is None
    (tmp_path / "endless").mkdir()
    weights[-1] = 0
    endless = ready_run(tmp_path / "endless", base, [ids] * 9, [weights] * 9, method="full")
    found = found_in(endless)["Q02"]
    assert found.severity == "error" and found.stops_with is BadData and "9 of 9" in found.found


def test_q02_allows_one_in_a_hundred(tmp_path, base):
    document = np.array([*ids_of("a text"), END_OF_TEXT])
    assert severity_of(ready_run(tmp_path, base, [document] * 99 + [document[:-1]]), "Q02") is None
    (tmp_path / "more").mkdir()
    assert severity_of(ready_run(tmp_path / "more", base, [document] * 98 + [document[:-1]] * 2), "Q02") == "warning"


def copy_row(model) -> None:
    """A head in which the end of a turn is like an unused token, while the embedding is sound."""
    model.lm_head.weight[TURN_END] = model.lm_head.weight[300]


@pytest.mark.parametrize("tie", [True, False])
def test_q04_untrained_rows_that_stay_frozen(tie, tokenizer, chats, tmp_path):
    edit = zero_rows(TURN_START, TURN_END) if tie else copy_row
    base = write_base(tmp_path / "base", tokenizer, tie_word_embeddings=tie, edit=edit)
    named = {"train_tokens": ["<|im_start|>"]}
    prepared = prepared_of(run_of(tmp_path, chats, method="lora", model=str(base), adapter=named))
    found = found_in(prepared)["Q04"]
    assert found.severity == "error" and "<|im_end|>" in found.found and "im_start" not in found.found
    load(prepared)  # a knowing user can pass
    for adapter in ({}, {"train_tokens": ["<|im_start|>", "<|im_end|>"]}):
        run = run_of(tmp_path, chats, method="lora", model=str(base), adapter=adapter)
        assert severity_of(prepared_of(run), "Q04") is None
    assert severity_of(prepared_of(run_of(tmp_path, chats, method="full", model=str(base))), "Q04") is None


def test_q04_small_rows_are_trained_ones(tokenizer, chats, tmp_path):
    """Chat models have rows of control tokens that are a hundred times smaller than the others, and trained."""

    def shrink(model):
        model.model.embed_tokens.weight[[TURN_START, TURN_END]] *= 0.01

    base = write_base(tmp_path / "base", tokenizer, edit=shrink)
    run = run_of(tmp_path, chats, method="lora", model=str(base), adapter={"train_tokens": []})
    assert severity_of(prepared_of(run), "Q04") is None


def tuned(base, chats, folder):
    """The base after full fine-tuning on the chats, so that it ends its turns."""
    job = prepared_of(run_of(folder, chats, method="full", model=str(base), optimizer={"lr": 1e-2})).job
    engine = build_engine(job, MACHINE)
    for step in range(60):
        batches = job.batches.step(step)
        engine.forward_backward(batches)
        engine.optimizer_step(1e-2, batches)
    hf.save_folder(engine.model, folder / "tuned", base, torch.float32)
    return folder / "tuned"


def liken(folder, cosine):
    """Turn the row of an unused token so that it has this cosine with the end of a turn."""
    tensors = load_file(folder / "model.safetensors")
    end = torch.nn.functional.normalize(tensors[hf.EMBEDDINGS][TURN_END], dim=0)
    other = torch.randn_like(end)
    other = torch.nn.functional.normalize(other - other @ end * end, dim=0)
    tensors[hf.EMBEDDINGS][300] = cosine * end + (1 - cosine**2) ** 0.5 * other
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("is_tuned", "cosine", "is_untrained"),
    [(True, 0.995, False), (False, 0.995, True), (True, 0.9999, True), (False, 0.98, False)],
)
def test_rows_like_an_unused_token_are_trained_if_the_model_ends_turns(
    is_tuned, cosine, is_untrained, base, chats, tmp_path
):
    folder = tuned(base, chats, tmp_path) if is_tuned else Path(shutil.copytree(base, tmp_path / "base"))
    liken(folder, cosine)
    job = prepared_of(run_of(tmp_path, chats, name="adapter", method="lora", model=str(folder))).job
    assert (job.pretrained_tokens.end_probability() > 0.2) == is_tuned
    assert job.trained_tokens == ([TURN_END] if is_untrained else [])


def test_q05_a_base_model_that_does_not_stop(tokenizer, chats, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, stops=[END_OF_TEXT])
    lora = prepared_of(run_of(tmp_path, chats, method="lora", model=str(base)))
    assert severity_of(lora, "Q05") == "warning"
    folder = Path(lora.run.runs_dir) / lora.run.name
    assert f"--generation-config {folder}/adapter" in found_in(lora)["Q05"].fix
    assert f"trivium export {folder} --merge --out FOLDER" in found_in(lora)["Q05"].fix
    full = prepared_of(run_of(tmp_path, chats, method="full", model=str(base)))
    assert severity_of(full, "Q05") is None  # the whole model gets a generation_config.json of its own
    (base / "generation_config.json").unlink()
    assert severity_of(prepared_of(lora.run), "Q05") == "warning"  # config.json says the same


def test_q10_an_embedding_that_would_lose_rows(prepared):
    smaller = replace(prepared, job=replace(prepared.job, shape=replace(prepared.job.shape, vocab_size=259)))
    found = found_in(smaller)["Q10"]
    assert found.severity == "error" and "259 rows" in found.found and "320" in found.found
    larger = replace(prepared, job=replace(prepared.job, shape=replace(prepared.job.shape, vocab_size=384)))
    assert severity_of(larger, "Q10") is None


def test_q11_ids_without_a_row(prepared):
    narrow = replace(prepared, job=replace(prepared.job, shape=replace(prepared.job.shape, vocab_size=TURN_END)))
    found = found_in(narrow)["Q11"]
    assert found.severity == "error" and "258" in found.found


def test_q11_a_model_that_stops_at_an_unknown_token(tokenizer, texts, tmp_path):
    letter = ids_of("a")[0]
    base = write_base(tmp_path / "base", tokenizer, stops=[letter, END_OF_TEXT])
    found = found_in(prepared_of(run_of(tmp_path, texts, method="continue", model=str(base))))["Q11"]
    assert found.severity == "warning" and f"{letter} (a)" in found.found


def test_q11_a_tokenizer_of_another_size(tokenizer, texts, tmp_path):
    base = write_base(tmp_path / "base", tokenizer, vocab_size=151936)
    found = found_in(prepared_of(run_of(tmp_path, texts, method="continue", model=str(base))))["Q11"]
    assert found.severity == "warning" and "259" in found.found


def test_q13_answers_that_start_at_the_wrong_token(tmp_path, base):
    ids, weights = chat_ids()
    late = weights.copy()
    late[np.flatnonzero(weights)[0]] = 0  # the first letter of the answer is not supervised
    prepared = ready_run(tmp_path, base, [ids] * 9, [late] * 9, method="full")
    found = found_in(prepared)["Q13"]
    assert found.severity == "error" and "<|im_start|>assistant" in found.expected
    (tmp_path / "sound").mkdir()
    assert severity_of(ready_run(tmp_path / "sound", base, [ids], [weights], method="full"), "Q13") is None


def test_q13_is_a_warning_with_an_unknown_template(tmp_path):
    own = CHATML_TEMPLATE.replace("assistant\\n", "fox\\n").replace(
        "message['role'] +", "('fox' if message['role'] == 'assistant' else message['role']) +"
    )
    base = write_base(tmp_path / "base", byte_tokenizer(tmp_path / "bytes", own))
    for name, expected in (("assistant", "warning"), ("fox", None)):
        (tmp_path / name).mkdir()
        ids, weights = chat_ids(before=name)
        prepared = ready_run(tmp_path / name, base, [ids] * 9, [weights] * 9, method="full")
        assert severity_of(prepared, "Q13") == expected


def test_q14_a_supervised_empty_think_block(thinker, chats, tmp_path):
    answers = prepared_of(run_of(tmp_path, chats, method="full", model=str(thinker)))
    assert severity_of(answers, "Q14") is None
    everything = prepared_of(run_of(tmp_path, chats, method="full", model=str(thinker), loss_tokens="all"))
    assert severity_of(everything, "Q14") == "warning"
    assert severity_of(everything, "Q02") is None  # the line break after the last turn is no end


def test_q18_samples_without_supervised_tokens(tmp_path, base):
    ids, weights = chat_ids()
    none = ready_run(tmp_path, base, [ids] * 9, [weights, *[0 * weights] * 8], method="full")
    assert severity_of(none, "Q18") == "warning"
    none.__dict__["samples"] = [sample._replace(is_ready_made=False) for sample in none.samples]
    found = found_in(none)["Q18"]
    assert found.severity == "error" and "8 of 9" in found.found


def test_q18_supervised_user_messages(tmp_path, base):
    ids, _ = chat_ids()
    everything = ready_run(tmp_path, base, [ids] * 9, method="full")
    assert severity_of(everything, "Q18") == "warning"
    meant = ready_run(tmp_path, base, [ids] * 9, method="full", loss_tokens="all")
    assert severity_of(meant, "Q18") is None
