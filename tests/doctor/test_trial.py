"""Rules that try the engine: sound engines pass elsewhere; here are engines and disks that would not do."""

import pytest
import torch

from tests.doctor.cases import case_of, found_in, run_of, severity_of, trial_of, write_base
from trivium.doctor.case import Trial
from trivium.engine.engine import Engine
from trivium.model import qwen


@pytest.fixture
def trial(base, chats, tmp_path) -> Trial:
    run = run_of(tmp_path, chats, method="full", model=str(base))
    return trial_of(case_of(run), tmp_path / "trial")


def test_m04_weights_that_give_no_numbers(tokenizer, chats, tmp_path):
    def poison(model):
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    base = write_base(tmp_path / "base", tokenizer, edit=poison)
    case = case_of(run_of(tmp_path, chats, method="full", model=str(base)))
    found = found_in(trial_of(case, tmp_path / "trial"))["M04"]
    assert found.severity == "error" and "nan" in found.trouble.found


def test_m04_a_step_that_teaches_nothing(trial):
    for parameter in trial.engine.parameters.values():
        parameter.register_hook(torch.zeros_like)
    assert severity_of(trial, "M04") == "error"


def test_m04_leaves_no_gradient_behind(trial):
    before = {name: parameter.clone() for name, parameter in trial.engine.parameters.items()}
    assert found_in(trial) == {}
    for name, parameter in trial.engine.parameters.items():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_m05_a_disk_that_keeps_something_else(trial, monkeypatch):
    load = trial.engine.load

    def bent(folder):
        state = load(folder)
        with torch.no_grad():
            next(iter(trial.engine.parameters.values())).view(-1)[0] += 1.0
        return state

    monkeypatch.setattr(trial.engine, "load", bent)
    assert severity_of(trial, "M05") == "error"
    assert not list(trial.folder.iterdir())


def test_m05_names_a_disk_that_is_full(trial, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    found = found_in(trial)["M05"]
    assert found.severity == "error" and "Disk full" in found.trouble.found


def test_q22_trained_weights_in_16_bits(trial):
    for parameter in trial.engine.parameters.values():
        parameter.data = parameter.data.bfloat16()
    assert severity_of(trial, "Q22") == "error"


def test_q24_attention_that_crosses_documents(trial, monkeypatch):
    def over_the_whole_row(q, k, v, documents):
        row = qwen.Documents(documents.cu_seqlens, (0, len(q)), len(q))
        return attend(q, k, v, row)

    attend = qwen.attend
    assert severity_of(trial, "Q24") is None
    monkeypatch.setattr(qwen, "attend", over_the_whole_row)
    assert severity_of(trial, "Q24") == "error"


class MeanOfMeans(Engine):
    """The mistake of 2024: each micro-batch is divided by its own number of learnt tokens."""

    def forward_backward(self, batches):
        self.model.train()
        for batch in batches:
            (self._loss_sum(batch) / batch.total_weight / len(batches)).backward()
        return 1.0


def test_q25_a_mean_of_means(trial):
    assert severity_of(trial, "Q25") is None
    trial.engine.__class__ = MeanOfMeans
    found = found_in(trial)["Q25"]
    assert found.severity == "error" and "%" in found.trouble.found


def test_q25_a_step_without_a_learnt_token(trial, monkeypatch):
    rows = trial.case.job.batches
    step = rows.step

    def silent(number):
        batches = step(number)
        if number == trial.case.job.num_steps - 1:
            for batch in batches:
                object.__setattr__(batch, "num_supervised", 0)
        return batches

    monkeypatch.setattr(rows, "step", silent)
    found = found_in(trial)["Q25"].trouble.found
    assert "no token that carries loss" in found and f"{trial.case.job.num_steps}" in found
