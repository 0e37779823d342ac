"""The rule about an adapter given as the model, as PEFT saves it."""

from tests.doctor.cases import found_in, run_of


def peft_adapter(folder, base, **options):
    """What stock PEFT saves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"]} | options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_m06_names_the_base_model(base, chats, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter", base)
    trouble = found_in(run_of(tmp_path, chats, method="lora", model=str(adapter)))["M06"]
    assert str(base) in trouble.fix and "export" in trouble.fix
