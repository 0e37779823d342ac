"""Rules about adapters: as PEFT saves them."""

import pytest

from tests.doctor.cases import found_in, run_of
from tests.support.models import write_base


@pytest.fixture(scope="module")
def untied(tokenizer, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("untied") / "model", tokenizer, tie_word_embeddings=False)


def peft_adapter(folder, base, **options):
    """What stock PEFT saves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"]} | options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def found_for(adapter, chats, tmp_path):
    return {
        name: finding.severity
        for name, finding in found_in(run_of(tmp_path, chats, method="lora", model=str(adapter))).items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "options", "expected"),
    [
        (True, {}, {}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, {"Q06": "error"}),
        (False, {"target_modules": ["q_proj", "lm_head"]}, {}),
        (True, {"modules_to_save": ["embed_tokens"]}, {"Q07": "warning"}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"Q07": "warning"}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, {}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        (True, {"trainable_token_indices": [257, 258]}, {}),
        (False, {"trainable_token_indices": [257, 258]}, {"Q09": "error"}),
        (False, {"trainable_token_indices": {"embed_tokens": [258], "lm_head": [258]}}, {}),
    ],
)
def test_adapters_that_a_user_brings(tied, options, expected, base, untied, chats, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter", base if tied else untied, **options)
    assert found_for(adapter, chats, tmp_path) == expected | {"M06": "error"}


def test_m06_names_the_base_model(base, chats, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter", base)
    trouble = found_in(run_of(tmp_path, chats, method="lora", model=str(adapter)))["M06"]
    assert str(base) in trouble.fix and "export" in trouble.fix
