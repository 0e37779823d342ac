"""Rules about adapters: those that a run would train, and those that a user brings as the model.

They read adapter_config.json as PEFT writes it, from the folder or from the engine. Imported by `examine.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from trivium.config.run import Run
from trivium.doctor.case import Trial
from trivium.doctor.findings import Rule, Trouble
from trivium.model import hf
from trivium.model.adapter import CONFIG, NAME

EMBEDDING, HEAD = "embed_tokens", "lm_head"


class AdapterFacts(NamedTuple):
    """An adapter's own description."""

    where: str
    content: dict[str, Any]
    tied: bool | None
    """Whether the base's head is its embedding; None when the base is not here to be asked."""

    def modules(self, key: str) -> set[str]:
        """The last part of the modules' names under a key of the description."""
        said = self.content.get(key) or []
        return {str(name).rpartition(".")[2] for name in ([said] if isinstance(said, str) else said)}


def brought(run: Run) -> AdapterFacts | None:
    """The adapter whose folder a run names as its model."""
    folder = Path(run.model.name) if run.model.name else None
    if folder is None or not (folder / CONFIG).is_file():
        return None
    content = hf.read_json(folder / CONFIG)
    base_config = Path(str(content.get("base_model_name_or_path"))) / "config.json"
    tied = bool(hf.read_json(base_config).get("tie_word_embeddings")) if base_config.is_file() else None
    return AdapterFacts(str(folder), content, tied)


def trained(trial: Trial) -> AdapterFacts | None:
    """The adapter in the engine, as it will be saved."""
    engine = trial.engine
    if trial.case.run.adapter is None:
        return None
    content = cast(Any, engine.model).peft_config[NAME].to_dict()
    return AdapterFacts("the run's adapter", content, trial.case.job.shape.tie_word_embeddings)


def adapter_as_model(run: Run) -> Trouble | None:
    """M06: an adapter where a model is expected."""
    facts = brought(run)
    if facts is None:
        return None
    base = facts.content.get("base_model_name_or_path")
    return Trouble(
        "error",
        f"model.name {facts.where} holds an {CONFIG}: it is an adapter of {base}, not a model.",
        "the folder of a whole model, which a new adapter or training can start from.",
        f"merge it first (trivium export {facts.where} --merge --to hf), or begin from its base: model={base}.",
    )


def on_tied_embeddings(facts: AdapterFacts) -> Trouble | None:
    """Q06: low-rank updates on a tensor that is both embedding and head."""
    adapted = sorted(facts.modules("target_modules") & {EMBEDDING, HEAD})
    if not facts.tied or not adapted:
        return None
    return Trouble(
        "error",
        f"{facts.where} adapts {' and '.join(adapted)} of a model whose head is its embedding.",
        "none of the two among target_modules: folded into the one shared tensor the update acts at both ends, so the "
        "merged model is another one than the adapter showed.",
        "train token rows instead (adapter.train_tokens, or trainable_token_indices in PEFT), or keep it unmerged.",
    )


def half_saved(facts: AdapterFacts) -> Trouble | None:
    """Q07: a whole copy of only one end of a tied pair, or of both without saying that they are tied."""
    saved = facts.modules("modules_to_save") & {EMBEDDING, HEAD}
    if not facts.tied or not saved or facts.content.get("ensure_weight_tying"):
        return None
    what = f"only {saved.pop()}" if len(saved) == 1 else "both, without ensure_weight_tying"
    return Trouble(
        "warning",
        f"{facts.where} has modules_to_save with {what}, of a model whose head is its embedding.",
        "embed_tokens and lm_head with ensure_weight_tying: true, or neither; else the two part, and what the one "
        "learns the other never does.",
        "train the adapter again with both and ensure_weight_tying, or with token rows alone.",
    )


def only_input_rows(facts: AdapterFacts) -> Trouble | None:
    """Q09: rows trained in the embedding of a model whose head is another tensor."""
    indices = facts.content.get("trainable_token_indices")
    if facts.tied is not False or not indices or (isinstance(indices, dict) and {EMBEDDING, HEAD} <= set(indices)):
        return None
    return Trouble(
        "error",
        f"{facts.where} has trainable_token_indices {indices} of a model with a head of its own.",
        f"the tokens under both {EMBEDDING} and {HEAD}; a list reaches the embedding alone, so the model learns to "
        "read them and never to write them.",
        "train it again with {embed_tokens: [...], lm_head: [...]}; Trivium's adapter.train_tokens does.",
    )


def of_brought(check: Callable[[AdapterFacts], Trouble | None]) -> Callable[[Run], Trouble | None]:
    """The check on an adapter that the run names as its model."""
    return lambda run: None if (facts := brought(run)) is None else check(facts)


def of_trained(check: Callable[[AdapterFacts], Trouble | None]) -> Callable[[Trial], Trouble | None]:
    """The check on the adapter that the run would train."""
    return lambda trial: None if (facts := trained(trial)) is None else check(facts)


RUN_RULES = (
    Rule[Run]("M06", "adapter-as-model", adapter_as_model),
    Rule[Run]("Q06", "lora-on-tied-embed", of_brought(on_tied_embeddings)),
    Rule[Run]("Q07", "tied-partial-save", of_brought(half_saved)),
    Rule[Run]("Q09", "untied-token-list", of_brought(only_input_rows)),
)
TRIAL_RULES = (
    Rule[Trial]("Q06", "lora-on-tied-embed", of_trained(on_tied_embeddings)),
    Rule[Trial]("Q07", "tied-partial-save", of_trained(half_saved)),
    Rule[Trial]("Q09", "untied-token-list", of_trained(only_input_rows)),
)
