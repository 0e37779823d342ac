"""The rule about an adapter folder given as the model, which reads the adapter_config.json that PEFT wrote."""

from pathlib import Path

from trivium.config.run import Run
from trivium.doctor.findings import Rule, Violation
from trivium.model import hf


def adapter_as_model(run: Run) -> Violation | None:
    """M06: an adapter where a model is expected."""
    folder = Path(run.model.name) if run.model.name else None
    if folder is None or not (folder / hf.ADAPTER_CONFIG).is_file():
        return None
    base = hf.read_json(folder / hf.ADAPTER_CONFIG).get("base_model_name_or_path")
    return Violation(
        "error",
        f"model.name {folder} is an adapter of {base}, not a model.",
        "the folder of a model.",
        f"start from its base model (model={base}), or merge it first: "
        f"trivium export {folder} --merge --out {folder}-merged",
    )


RULES = (Rule[Run]("M06", "adapter-as-model", adapter_as_model),)
