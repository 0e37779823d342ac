"""Public benchmarks, defined and scored by EleutherAI's lm-evaluation-harness (installed by the extra `eval`)."""

from importlib import import_module
from importlib.util import find_spec

from trivium.errors import ConfigError
from trivium.use.load import Loaded

BATCH_SIZE = 16


def require_harness() -> None:
    """Raises: ConfigError when the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs lm-evaluation-harness, which is not installed. Install it with: "
            "pip install 'trivium[eval]'"
        )


def run_tasks(loaded: Loaded, tasks: list[str]) -> dict[str, dict[str, float]]:
    """The metrics of each task, by the harness's names of metric and filter.

    Raises: ConfigError when the harness is not installed or does not have a task.
    """
    require_harness()
    # Imported by name because type checkers do not find the optional package.
    lm_eval, tasks_module = import_module("lm_eval"), import_module("lm_eval.tasks")
    manager = tasks_module.TaskManager()
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness has no task {', '.join(unknown)}. List them with: lm_eval ls tasks")
    if loaded.place.kind == "adapter":
        # The harness ties the weights again, which fails on embeddings wrapped by PEFT.
        loaded.network.tie_weights = lambda *_, **__: None
    model = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=loaded.network, tokenizer=loaded.tokenizer, batch_size=BATCH_SIZE
    )
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, apply_chat_template=loaded.converses, log_samples=False
    )
    return {
        task: {name: value for name, value in figures.items() if "," in name and isinstance(value, float)}
        for task, figures in found["results"].items()
    }
