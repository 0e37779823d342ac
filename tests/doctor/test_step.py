"""The rule that runs the engine: a step that is not finite, or without gradient."""

import pytest
import torch

from tests.doctor.cases import found_in, prepared_of, run_of, severity_of
from tests.support.models import write_base
from trivium.doctor.prepared import LoadedRun, load


@pytest.fixture
def loaded(base, chats, tmp_path) -> LoadedRun:
    run = run_of(tmp_path, chats, method="full", model=str(base))
    return load(prepared_of(run))


def test_m04_weights_that_overflow(tokenizer, chats, tmp_path):
    def poison(model):
        model.model.layers[0].mlp.up_proj.weight[0] = 3e38

    base = write_base(tmp_path / "base", tokenizer, edit=poison)
    prepared = prepared_of(run_of(tmp_path, chats, method="full", model=str(base)))
    found = found_in(load(prepared))["M04"]
    assert found.severity == "error" and "nan" in found.found


def test_m04_a_step_without_gradient(loaded):
    for parameter in loaded.engine.parameters.values():
        parameter.register_hook(torch.zeros_like)
    assert severity_of(loaded, "M04") == "error"


def test_m04_leaves_no_gradient_behind(loaded):
    before = {name: parameter.clone() for name, parameter in loaded.engine.parameters.items()}
    assert found_in(loaded) == {}
    for name, parameter in loaded.engine.parameters.items():
        assert parameter.grad is None and torch.equal(parameter, before[name])
