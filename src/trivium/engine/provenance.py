"""Provenance of a run: `provenance.json`, and the summary that is printed when a run starts."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.config.inputs import Source
from trivium.config.load import flatten
from trivium.config.run import Run
from trivium.data.store.build import BuiltStore
from trivium.data.store.tally import describe_counts
from trivium.engine.device import Machine, describe, probe
from trivium.engine.engine import Engine
from trivium.engine.prepare import Job, supervised_share
from trivium.engine.runfolder import RunFolder, now
from trivium.errors import count_of
from trivium.files import sha256_file
from trivium.model.card import serve_command_of_run

BATCHING_KEYS = ("batch.micro_tokens", "activation_checkpointing")
"""The settings that a resumed run may change, since they do not change the samples of a step or their order."""
DTYPE_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
RECORDED_PACKAGES = ("trivium", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    return {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}}


def describe_run(job: Job, engine: Engine, machine: Machine) -> dict[str, Any]:
    """Versions, hardware, model, hashes of tokenizer and data, and the commit of the working directory."""
    return {
        "versions": versions(),
        "hardware": {
            "platform": platform.platform(),
            "device": describe(machine.device),
            "compute_dtype": str(machine.compute_dtype).removeprefix("torch."),
            "peak_flops": machine.peak_flops,
            "num_threads": torch.get_num_threads(),
        },
        "model": {
            **asdict(job.shape),
            "num_params": job.shape.num_params,
            "num_trained_params": num_trained_params(engine),
        },
        "tokenizer_sha256": sha256_file(job.tokenizer_folder / "tokenizer.json"),
        "data": [
            {
                **source_name(part.source),
                **({} if part.kind == "all" else {"kind": part.kind}),
                "fingerprint": part.built.open().fingerprint,
                "num_tokens": int(part.store.lengths.sum(dtype=np.int64)),
                "token_share": share,
            }
            for part, share in zip(job.mixture, job.batches.order.token_shares(epoch=0), strict=True)
        ],
        "inputs": job.inputs,
        "num_steps": job.num_steps,
        "git_commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def num_trained_params(engine: Engine) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in engine.parameters.values())


def source_name(source: Source) -> dict[str, Any]:
    """The path, Hub id or store of a source."""
    return {key: value for key, value in source.model_dump().items() if key in ("path", "hub", "store") and value}


def git_commit() -> str | None:
    """The git commit of the working directory; None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def begun_machine(provenance: dict[str, Any], run: Run) -> Machine:
    """The machine with the compute dtype of the run's first start, which a new measurement could choose differently."""
    return probe(run.device, DTYPE_PRECISIONS[provenance["hardware"]["compute_dtype"]])


def record_start(job: Job, engine: Engine, machine: Machine, folder: RunFolder, previous: dict[str, Any]) -> None:
    """Write provenance.json at the first start and add an entry to its `starts`; delete failure.json."""
    record = describe_run(job, engine, machine)
    settled = flatten(job.run)
    this_start = {
        "time": now(),
        "versions": record["versions"],
        "hardware": record["hardware"],
        "batching": {key: settled[key] for key in BATCHING_KEYS},
    }
    folder.write("provenance.json", {**record, **previous, "starts": [*previous.get("starts", []), this_start]})
    if folder.is_writer:
        (folder.path / "failure.json").unlink(missing_ok=True)


def describe_job(job: Job, engine: Engine, machine: Machine) -> Iterator[str]:
    """The lines printed when a run starts: model, data, device, and what the user may have overlooked."""
    summary = f"{job.shape.num_params:,} parameters"
    if job.run.adapter:
        scaling = job.run.adapter.scaling
        summary += f", {num_trained_params(engine):,} of them trained in an adapter with scaling {scaling:g}"
    summary += f", {job.facts.num_tokens:,} training tokens"
    if len(job.mixture) > 1:
        shares = zip(job.mixture, job.batches.order.token_shares(epoch=0), strict=True)
        names = [f"{part.built.name if part.kind == 'all' else part.kind} {share:.1%}" for part, share in shares]
        summary += f" ({', '.join(names)})"
    summary += f", {count_of(job.num_steps, 'step')} of {job.run.step_tokens:,} tokens"
    yield f"{summary}, {describe(machine.device)}, {str(machine.compute_dtype).removeprefix('torch.')}"
    for built in job.built:
        if built.report.get("conversations"):
            yield describe_conversations(built)
    if engine.model.head_rows is not None:
        tokens = ", ".join(job.tokenizer.convert_ids_to_tokens(engine.model.head_rows[0].tolist()))
        yield (
            f"the embeddings of {tokens} are trained with the adapter; transformers and PEFT load them, but servers "
            "that accept only low-rank matrices (vLLM) need the merged model: trivium export RUN --merge --out FOLDER"
        )
    if not job.held_out:
        yield f"nothing is held out, so there is no evaluation: {'; '.join(reasons_for_no_held_out(job))}"


def describe_serving(job: Job, folder: Path) -> Iterator[str]:
    """The last lines of a run that trained an adapter for conversations: how to serve it so that answers end."""
    run = job.run
    if run.adapter is None or not job.has_conversations:
        return
    base, result = str(run.model.name), folder / "adapter"
    command = serve_command_of_run(base, result, run.adapter, bool(job.trained_tokens))
    if command:
        yield (
            f"to serve the adapter with vLLM: {command}. Without --generation-config the base model's stop tokens "
            "count, and answers may never end"
        )
    else:
        merged = f"trivium export {shlex.quote(str(folder))} --merge --out FOLDER"
        yield f"vLLM cannot load this adapter; to serve the merged model: {merged}"


def reasons_for_no_held_out(job: Job) -> list[str]:
    """Why a run has no held-out documents to evaluate on, each reason once."""
    if job.run.data.held_out == 0:
        return ["data.held_out is 0"]
    reasons = []
    for built in job.built:
        if not built.report:
            reason = "an external store has no held-out documents"
        elif built.report["held_out_documents"]:
            reason = "the held-out documents have no supervised token within eval.max_tokens"
        else:
            reason = (
                f"{built.name} has only one distinct document, {count_of(built.report['documents'], 'time')}; copies "
                "of a document are never held out from each other"
            )
            if not built.has_conversations:
                reason += " (a text file is one document; to split it, set data.sources.0.documents=line)"
        reasons.append(reason)
    return list(dict.fromkeys(reasons))


def describe_conversations(built: BuiltStore) -> str:
    """The counts of a source's conversations in one line."""
    report = built.report
    share = report["reasoning_documents"] / max(1, report["kept"] + report["split"])
    notes = [*describe_counts(report), f"{supervised_share(built):.1%} of the tokens are supervised"]
    return f"{built.name}: " + "; ".join([*notes, f"{share:.1%} of the samples have reasoning"] if share else notes)
