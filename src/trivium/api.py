"""Trivium for notebooks and scripts: the functions behind the commands, with Python values instead of options.

A run is given as a run file, as its keys (`method="lora", model=..., data=...`), or as a file and the keys to change;
nested keys are dicts: `budget={"epochs": 2}`. Errors are the same `TriviumError` paragraphs that the commands print; an
option `--held-out FILE` in one is the argument `held_out=FILE` here. Progress is shown as by the commands, which call
these functions. torch is imported inside them, when it is needed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from trivium.config.inputs import Data
from trivium.config.load import ResolvedRun, load_run
from trivium.config.run import METHOD_DEFAULTS, Run
from trivium.errors import ConfigError, TriviumError
from trivium.files import GIB
from trivium.results import Diagnosis, ModelComparison, Report, TrainedRun, TrainingPlan

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trivium.model.shape import QwenShape
    from trivium.plan.workload import DataFacts
    from trivium.use.compare import Note
    from trivium.use.evaluate import Evaluation
    from trivium.use.export import Export

__all__ = [
    "Diagnosis",
    "LoadedModel",
    "ModelComparison",
    "Report",
    "TrainedRun",
    "TrainingPlan",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "load",
    "open_run",
    "plan",
    "train",
]

File = str | PathLike[str]
Amount = str | float
"""A number above zero, also with a suffix: `5000` or `"5K"`."""
SEQ_LEN: int = Data.model_fields["seq_len"].default
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class LoadedModel(NamedTuple):
    """A model that is ready to use, and its tokenizer: `model, tokenizer = trivium.load(...)`."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: "PreTrainedTokenizerBase"


def train(run_file: File | None = None, /, *overrides: str, allow: Iterable[str] = (), **keys: Any) -> TrainedRun:
    """Train a run, or resume it; the same call again does nothing if it is finished.

    Args:
        run_file: a run file; None if the keys describe the whole run.
        overrides: `key=value` with dotted keys, as on the command line.
        allow: ids of the doctor's rules whose errors do not stop the run.
        keys: keys of a run file as Python values; they win over the run file's.

    Raises:
        ConfigError: the configuration is wrong, or the folder belongs to another run; nothing was changed.
        BadData: the data cannot be used; nothing was changed.
        DoesNotFit: memory or disk ran out; saved files are unchanged.
        Stopped: the run was interrupted and everything was saved; the same call continues.
        TriviumError: the run could not continue.
    """
    resolved = _resolve(run_file, overrides, keys)

    from trivium.doctor.examine import allowed_ids
    from trivium.train import train as train_run

    return TrainedRun(train_run(resolved, allowed_ids(tuple(allow))).path)


def open_run(folder: File) -> TrainedRun:
    """A run that was trained before, finished or not. Raises: TriviumError when `folder` is not a run folder."""
    from trivium.engine.runfolder import RunFolder

    return TrainedRun(RunFolder.existing(Path(folder)).path)


def doctor(run_file: File | None = None, /, *overrides: str, allow: Iterable[str] = (), **keys: Any) -> Diagnosis:
    """Check a run for mistakes without training it; see `train` for the arguments.

    Returns: the findings, also those that stop a run; `require_sound` raises for these.

    Raises: ConfigError when the run file, a key or an id in `allow` is wrong.
    """
    resolved = _resolve(run_file, overrides, keys)

    from trivium.doctor.examine import allowed_ids, examine
    from trivium.report.progress import waiting

    allowed, findings, failure = allowed_ids(tuple(allow)), [], None
    with waiting() as wait:
        try:
            for finding in examine(resolved.run, allowed, wait.note):
                findings.append(finding)
        except TriviumError as error:
            failure = error
    return Diagnosis(tuple(findings), allowed, failure)


def plan(
    target: File | None = None,
    /,
    *overrides: str,
    data: File | Sequence[File] | Mapping[str, Any] | None = None,
    rows: Amount | None = None,
    tokens: Amount | None = None,
    kind: Literal["conversations", "documents"] | None = None,
    device: str | None = None,
    devices: int | None = None,
    memory: Amount | None = None,
    method: str | None = None,
    prefer: Literal["cheapest", "fastest"] = "cheapest",
    max_cost: Amount | None = None,
    max_hours: Amount | None = None,
    adapter_only: bool = False,
    general: bool | None = None,
    write: File | None = None,
    **keys: Any,
) -> TrainingPlan:
    """Plan a run: method, memory, time and cost. Keys that you set are kept; all others are searched.

    Args:
        target: a run file, a model (a name, a folder, or a size like 25M), or None if keys or data say what to plan.
        overrides: `key=value` with dotted keys, as on the command line.
        data: files or folders of training data, or the key `data` of a run as a dict.
        rows, tokens, kind: the data in numbers, instead of files.
        device: the device to train on (`l40s`), or `any` for the best one to rent. Default: this machine.
        devices: number of devices. Default: 1, or up to 8 for a rented GPU.
        memory: memory to use on each device, in GiB. Default: all of it.
        method: training method. Default: chosen to suit the data.
        prefer: what to optimize.
        max_cost, max_hours: limits of the run in US dollars and hours.
        adapter_only: the model's license lets you publish only an adapter.
        general: whether an existing model already does the task well enough.
        write: write the plan as a run file.
        keys: other keys of a run file as Python values; with `model` they are the run to plan.

    Raises:
        ConfigError: the run file, a key or an argument is wrong.
        DoesNotFit: nothing fits; the message has the cheapest changes that would.
    """
    from trivium.plan import request as requests
    from trivium.plan.advice import advise, write_run
    from trivium.report.progress import waiting

    requests.one_of("--kind", kind, ("conversations", "documents"))
    requests.one_of("--prefer", prefer, ("cheapest", "fastest"))
    requests.one_of("--method", method, tuple(METHOD_DEFAULTS))
    if devices is not None and devices < 1:
        raise ConfigError(f"--devices is {devices}; expected a whole number from 1.")
    given = {"--rows": rows, "--tokens": tokens, "--memory": memory, "--max-cost": max_cost, "--max-hours": max_hours}
    numbers = {name: None if value is None else requests.amount(name, value) for name, value in given.items()}
    sources = () if data is None or isinstance(data, Mapping) else _paths(data)
    request = requests.PlanRequest(
        target=None if target is None else str(target),
        overrides=overrides,
        keys=keys if not isinstance(data, Mapping) else {**keys, "data": data},
        sources=sources,
        facts=requests.facts_in_numbers(numbers["--rows"], numbers["--tokens"], kind, bool(sources)),
        device=device,
        num_devices=devices,
        memory_bytes=None if numbers["--memory"] is None else int(numbers["--memory"] * GIB),
        method=method,
        prefer=prefer,
        max_cost=numbers["--max-cost"],
        max_hours=numbers["--max-hours"],
        adapter_only=adapter_only,
        is_general=general,
        name=Path(write).stem if write else "plan",
    )
    with waiting() as wait:
        resolved = requests.resolve_request(request, lambda found: _survey(found, wait.note), _read_hub)
    advice = advise(resolved.situation, resolved.decision, resolved.goal)
    if write and advice.plan:
        write_run(advice.plan, Path(write), requests.placeholder_notes(advice.plan))
    return TrainingPlan(advice)


def evaluate(
    model: File,
    *,
    held_out: File | None = None,
    prompts: File | None = None,
    answers: File | None = None,
    lm_eval: Sequence[str] = (),
    seq_len: int = SEQ_LEN,
    max_new_tokens: int = 256,
    thinking: bool = False,
    nf4: bool = False,
) -> "Evaluation":
    """Evaluate a model; by default, measure the loss of a run on its own held-out set.

    Args:
        model: a run folder, the folder of a model or an adapter, or a Hub id.
        held_out: measure the loss on this file of documents or conversations.
        prompts: answer these prompts; score exact match, valid JSON and stop rate.
        answers: write every answer to this .jsonl file.
        lm_eval: tasks of lm-evaluation-harness to run.
        seq_len: sequence length for `held_out`.
        max_new_tokens: maximum tokens of an answer.
        thinking: turn reasoning on, if the template has the switch.
        nf4: quantize an adapter's base model to NF4, as QLoRA training does.

    Raises: ConfigError or BadData when the model or a file cannot be used.
    """
    from trivium.report.progress import waiting
    from trivium.use.evaluate import evaluate as evaluate_model

    with waiting() as wait:
        return evaluate_model(
            str(model),
            held_out=_path(held_out),
            prompts=_path(prompts),
            answers_file=_path(answers),
            tasks=[task.strip() for task in lm_eval],
            seq_len=seq_len,
            max_new_tokens=max_new_tokens,
            thinking=thinking,
            nf4=nf4,
            note=wait.note,
            bar=wait.bar,
        )


def compare(
    *models: File,
    prompts: File | None = None,
    held_out: File | None = None,
    general: File | None = None,
    out: File | None = None,
    max_new_tokens: int = 256,
    thinking: bool = False,
) -> ModelComparison:
    """Compare models and their base models: quality, forgetting, cost and answers.

    Args:
        models: run folders, folders of models or adapters, or Hub ids.
        prompts: a file of prompts, with or without expected answers.
        held_out: measure the loss on this file. Default: the first run's held-out set.
        general: measure forgetting: the increase in loss on this file of general text.
        out: write report.html and comparison.json into this folder.
        max_new_tokens: maximum tokens of an answer.
        thinking: turn reasoning on, if the template has the switch.

    Raises: ConfigError or BadData when a model or a file cannot be used.
    """
    from trivium.report.comparison import write_comparison
    from trivium.report.progress import waiting
    from trivium.use.compare import compare as compare_models

    if not models:
        raise ConfigError("There is nothing to compare. Give at least one run or model, for example runs/lora.")
    with waiting() as wait:
        found = compare_models(
            [str(model) for model in models],
            prompts=_path(prompts),
            held_out=_path(held_out),
            general=_path(general),
            max_new_tokens=max_new_tokens,
            thinking=thinking,
            note=wait.note,
            bar=wait.bar,
        )
    if out is not None:
        write_comparison(found, Path(out))
    return ModelComparison(found)


def export(model: File, out: File, *, merge: bool = False, dtype: Dtype | None = None) -> "Export":
    """Export a model or adapter to a Hugging Face folder, load it again, and compare its logits with the original's.

    Args:
        model: a run folder, or the folder of a model or an adapter.
        out: the folder to create; existing files are never overwritten.
        merge: merge the adapter into its base model, so that PEFT is not needed.
        dtype: dtype of the merged weights. Default: the base model's.

    Raises: ConfigError when there is nothing to export or `out` is in use; TriviumError when the logits differ.
        Nothing is left behind then.
    """
    import torch

    from trivium.plan.request import one_of
    from trivium.report.progress import waiting
    from trivium.use.export import export as export_model

    one_of("--dtype", dtype, DTYPES)
    with waiting() as wait:
        return export_model(str(model), Path(out), merge, getattr(torch, dtype) if dtype else None, wait.note)


def load(model: File, *, nf4: bool = False) -> LoadedModel:
    """Load a model and its tokenizer with transformers, on the accelerator if there is one.

    Args:
        model: a run folder, the folder of a model or an adapter, or a Hub id. An adapter is applied to its base model.
        nf4: quantize an adapter's base model to NF4, as QLoRA training does.

    Raises: ConfigError when there is no such model, or it is damaged, incomplete or not a Qwen model.
    """
    from trivium.report.progress import waiting
    from trivium.use.load import load as load_model

    with waiting() as wait:
        loaded = load_model(str(model), wait.note, nf4=nf4)
    return LoadedModel(loaded.model, loaded.tokenizer)


def _resolve(run_file: File | None, overrides: Sequence[str], keys: dict[str, Any]) -> ResolvedRun:
    return load_run(_path(run_file), overrides, keys)


def _path(file: File | None) -> Path | None:
    return None if file is None else Path(file)


def _paths(files: File | Sequence[File]) -> tuple[str, ...]:
    return tuple(str(file) for file in ([files] if isinstance(files, str | PathLike) else files))


def _survey(run: Run, note: "Note") -> "DataFacts":
    """Facts about the data of a run, with the tokens counted if its tokenizer is on this machine."""
    from trivium.data.chat.samples import ConversationSettings
    from trivium.data.look.estimate import template_tokens
    from trivium.data.look.survey import survey
    from trivium.data.tokenizer import load_for_counting
    from trivium.model.resolve import tokenizer_at_hand
    from trivium.plan.workload import DataFacts

    folder = tokenizer_at_hand(run)
    found = survey(
        run.data.sources,
        load_for_counting(folder) if folder else None,
        ConversationSettings(run.data.seq_len, run.data.overlong, run.loss_tokens == "all"),
        held_out=run.data.held_out,
        template=template_tokens(run.model.name or ""),
    )
    note(f"data: {found.how}")
    return DataFacts(**{field.name: getattr(found, field.name) for field in fields(DataFacts)})


def _read_hub(name: str) -> "QwenShape":
    """The shape of a model on the Hub, without downloading its weights."""
    from trivium.model import hf

    return hf.read_shape(hf.find_folder(name, with_weights=False))
