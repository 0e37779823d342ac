"""Rules about an adapter that the user gives as the model: its adapter_config.json, as PEFT writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trivium.config.run import Run
from trivium.doctor.findings import Rule, Violation
from trivium.model import hf
from trivium.model.adapter import CONFIG

EMBEDDING, HEAD = "embed_tokens", "lm_head"


class AdapterFacts(NamedTuple):
    """What an adapter's own files say."""

    folder: Path
    content: dict[str, Any]
    tied: bool | None
    """Whether the base ties its embeddings; None when the base is not on this machine."""

    def modules(self, key: str) -> set[str]:
        """The last parts of the module names under a key of adapter_config.json."""
        said = self.content.get(key) or []
        return {str(name).rpartition(".")[2] for name in ([said] if isinstance(said, str) else said)}


def given_adapter(run: Run) -> AdapterFacts | None:
    """The adapter whose folder the run names as its model."""
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
        f"model.name {adapter.folder} holds an {CONFIG}: it is an adapter of {base}, not a model.",
        "the folder of a whole model.",
        f"merge it first (trivium export {adapter.folder} --merge --to hf), or start from its base: model={base}.",
    )


def on_tied_embeddings(adapter: AdapterFacts) -> Violation | None:
    """Q06: low-rank updates of a tensor that is both embedding and head."""
    adapted = sorted(adapter.modules("target_modules") & {EMBEDDING, HEAD})
    if not adapter.tied or not adapted:
        return None
    return Violation(
        "error",
        f"{adapter.folder} adapts {' and '.join(adapted)} of a model with tied embeddings.",
        "neither of them among target_modules: merging adds the update to the one shared tensor, so it acts at both "
        "ends and the merged model differs from the adapter.",
        "train single tokens instead (adapter.train_tokens, or trainable_token_indices in PEFT), or keep it unmerged.",
    )


def half_saved(adapter: AdapterFacts) -> Violation | None:
    """Q07: a full copy of only one end of a tied pair, or of both without weight tying."""
    saved = adapter.modules("modules_to_save") & {EMBEDDING, HEAD}
    if not adapter.tied or not saved or adapter.content.get("ensure_weight_tying"):
        return None
    what = f"only {saved.pop()}" if len(saved) == 1 else "both, without ensure_weight_tying"
    return Violation(
        "warning",
        f"{adapter.folder} has modules_to_save with {what}, of a model with tied embeddings.",
        "embed_tokens and lm_head with ensure_weight_tying: true, or neither; otherwise the two drift apart.",
        "train the adapter again with both and ensure_weight_tying, or with single tokens only.",
    )


def only_input_tokens(adapter: AdapterFacts) -> Violation | None:
    """Q09: tokens trained in the embedding but not in the separate head."""
    indices = adapter.content.get("trainable_token_indices")
    if adapter.tied is not False or not indices or (isinstance(indices, dict) and {EMBEDDING, HEAD} <= set(indices)):
        return None
    return Violation(
        "error",
        f"{adapter.folder} has trainable_token_indices {indices} of a model with a separate head.",
        f"the tokens under both {EMBEDDING} and {HEAD}; a list trains the embedding alone, so the model learns to read "
        "the tokens but not to write them.",
        "train it again with {embed_tokens: [...], lm_head: [...]}; Trivium's adapter.train_tokens does.",
    )


def of_given(check: Callable[[AdapterFacts], Violation | None]) -> Callable[[Run], Violation | None]:
    """The check, applied to the adapter that the run names as its model, if it names one."""
    return lambda run: None if (adapter := given_adapter(run)) is None else check(adapter)


RULES = (
    Rule[Run]("M06", "adapter-as-model", of_given(adapter_as_model)),
    Rule[Run]("Q06", "lora-on-tied-embed", of_given(on_tied_embeddings)),
    Rule[Run]("Q07", "tied-partial-save", of_given(half_saved)),
    Rule[Run]("Q09", "untied-token-list", of_given(only_input_tokens)),
)
