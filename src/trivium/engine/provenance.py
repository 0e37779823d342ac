"""What a run was made of: the record `provenance.json`. Used by `start`."""

import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.config.run import Source
from trivium.engine.device import Machine, describe
from trivium.engine.engine import Engine
from trivium.engine.setup import Job
from trivium.files import sha256_file

RECORDED_PACKAGES = ("trivium", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}}


def provenance(job: Job, engine: Engine, machine: Machine) -> dict[str, Any]:
    """What a run was made of: versions, hashes of data and tokenizer, hardware, the commit of the working folder."""
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
            "num_trained_params": sum(parameter.numel() for parameter in engine.parameters.values()),
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
            for part, share in zip(job.parts, job.rows.order.token_shares(epoch=0), strict=True)
        ],
        "inputs": job.inputs,
        "num_steps": job.num_steps,
        "git_commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def source_name(source: Source) -> dict[str, Any]:
    """How a source is named in records."""
    return {key: value for key, value in source.model_dump().items() if key in ("path", "hub", "store") and value}


def git_commit() -> str | None:
    """The commit of the folder the command runs in; None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
