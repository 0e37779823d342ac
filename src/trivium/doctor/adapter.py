"""Rules about an adapter folder given as the model. They read its adapter_config.json, which PEFT wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trivium.config.run import Run
from trivium.doctor.findings import Rule, Violation
from trivium.model import hf
from trivium.model.adapter import CONFIG

EMBEDDING, HEAD = "embed_tokens", "lm_head"


class AdapterFacts(NamedTuple):
    """The contents of an adapter folder."""

    folder: Path
    content: dict[str, Any]
    tied: bool | None
    """Whether the base model ties its embeddings; None if it is not on this machine."""

    def modules(self, key: str) -> set[str]:
        """The last parts of the module names under a key of adapter_config.json."""
        names = self.content.get(key) or []
        return {str(name).rpartition(".")[2] for name in ([names] if isinstance(names, str) else names)}


def given_adapter(run: Run) -> AdapterFacts | None:
    """The adapter that the run names as its model; None if it names a model."""
    folder = Path(run.model.name) if run.model.name else None
    if folder is None or not (folder / CONFIG).is_file():
        return None
    content = hf.read_json(folder / CONFIG)
    base_config = Path(str(content.get("base_model_name_or_path"))) / "config.json"
    tied = bool(hf.read_json(base_config).get("tie_word_embeddings")) if base_config.is_file() else None
    return AdapterFacts(folder, content, tied)


def adapter_as_model(adapter: AdapterFacts) -> Violation | None:
    """M06: an adapter where a model is expected."""
    base = adapter.content.get("base_model_name_or_path")
    return Violation(
        "error",
        f"model.name {adapter.folder} is an adapter of {base}, not a model.",
        "the folder of a model.",
        f"start from its base model (model={base}), or merge it first: "
        f"trivium export {adapter.folder} --merge --out {adapter.folder}-merged",
    )


def on_tied_embeddings(adapter: AdapterFacts) -> Violation | None:
    """Q06: a low-rank update of a tensor that is both embedding and head."""
    adapted = sorted(adapter.modules("target_modules") & {EMBEDDING, HEAD})
    if not adapter.tied or not adapted:
        return None
    return Violation(
        "error",
        f"{adapter.folder} adapts {' and '.join(adapted)} of a model with tied embeddings.",
        "target_modules without embed_tokens and lm_head: merging adds the update to the one shared tensor, so the "
        "merged model differs from the adapter.",
        "train single tokens instead (adapter.train_tokens, or trainable_token_indices in PEFT), or do not merge it.",
    )


def half_saved(adapter: AdapterFacts) -> Violation | None:
    """Q07: modules_to_save with one of two tied modules, or with both but untied."""
    saved = adapter.modules("modules_to_save") & {EMBEDDING, HEAD}
    if not adapter.tied or not saved or adapter.content.get("ensure_weight_tying"):
        return None
    what = f"only {saved.pop()}" if len(saved) == 1 else "both, without ensure_weight_tying"
    return Violation(
        "warning",
        f"modules_to_save of {adapter.folder} has {what}, and the model has tied embeddings.",
        "embed_tokens and lm_head with ensure_weight_tying: true, or neither; otherwise the two diverge.",
        "train the adapter again with both and ensure_weight_tying, or with single tokens (adapter.train_tokens).",
    )


def only_input_tokens(adapter: AdapterFacts) -> Violation | None:
    """Q09: tokens trained in the embedding but not in the separate head."""
    indices = adapter.content.get("trainable_token_indices")
    if adapter.tied is not False or not indices or (isinstance(indices, dict) and {EMBEDDING, HEAD} <= set(indices)):
        return None
    return Violation(
        "error",
        f"{adapter.folder} has trainable_token_indices {indices}, and the model has a separate head.",
        f"the tokens under both {EMBEDDING} and {HEAD}; a list trains only the embedding, so the model learns to read "
        "the tokens but not to write them.",
        "train it again with {embed_tokens: [...], lm_head: [...]}, or in Trivium with adapter.train_tokens.",
    )


def of_given(check: Callable[[AdapterFacts], Violation | None]) -> Callable[[Run], Violation | None]:
    """The check, applied to the adapter that the run names as its model, if any."""
    return lambda run: None if (adapter := given_adapter(run)) is None else check(adapter)


RULES = (
    Rule[Run]("M06", "adapter-as-model", of_given(adapter_as_model)),
    Rule[Run]("Q06", "lora-on-tied-embed", of_given(on_tied_embeddings)),
    Rule[Run]("Q07", "tied-partial-save", of_given(half_saved)),
    Rule[Run]("Q09", "untied-token-list", of_given(only_input_tokens)),
)
