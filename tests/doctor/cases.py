"""Small real runs for the doctor: conversations and documents, prepared as training prepares them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.models import byte_tokenizer
from tests.support.qwen_tokenizers import real_tokenizer
from trivium.config.run import Run, with_method_defaults
from trivium.data.tokenizer import load_tokenizer
from trivium.doctor.examine import LOADED_RULES, PREPARED_RULES, RUN_RULES
from trivium.doctor.findings import Finding, check
from trivium.doctor.prepared import LoadedRun, PreparedRun, prepare_checks
from trivium.engine.device import Machine
from trivium.engine.prepare import prepare

MACHINE = Machine(torch.device("cpu"), torch.float32, 1e15, memory_bytes=8 << 30)
PAIRS = [(f"What does fox number {n} do?", f"It draws {n} red houses.") for n in range(40)]


def thinking_tokenizer(folder: Path) -> Path:
    """262 tokens and more with Qwen3's own template: its control tokens, and bytes for all else."""
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(byte_tokenizer(folder / "plain"))
    control = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in control])
    config = json.loads((real_tokenizer("qwen3") / "tokenizer_config.json").read_text())
    tokenizer.chat_template = config["chat_template"]
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_rows(pairs: Sequence[tuple[str, str]] = PAIRS, system: str | None = None) -> list[dict[str, Any]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        {"messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def text_rows(num_rows: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"Fox {n} drew {n + 1} houses. " + "The sun was warm. " * (n % 7)} for n in range(num_rows)]


def run_of(folder: Path, source: Any, **values: Any) -> Run:
    """A run whose everything is in `folder`; `data` and the rest of `values` go over the defaults."""
    data = {"seq_len": 128, "held_out": 0.1, "workers": 1} | values.pop("data", {})
    sources = [str(source)] if isinstance(source, Path) else source
    defaults = {
        "name": "small",
        "data": {"sources": sources, **data},
        "batch": {"tokens": 512},
        "device": "cpu",
        "precision": "fp32",
        "runs_dir": str(folder / "runs"),
    }
    return Run.model_validate(with_method_defaults(defaults | values))


def prepared_of(run: Run) -> PreparedRun:
    return prepare_checks(prepare(run, lambda text: None), MACHINE, with_hub=True)


def found_in(subject: Run | PreparedRun | LoadedRun) -> dict[str, Finding]:
    """What the doctor finds, by id."""
    if isinstance(subject, Run):
        findings = check(RUN_RULES, subject)
    elif isinstance(subject, PreparedRun):
        findings = check(PREPARED_RULES, subject)
    else:
        findings = check(LOADED_RULES, subject)
    return {finding.id: finding for finding in findings}


def severity_of(subject: Run | PreparedRun | LoadedRun, name: str) -> str | None:
    """How severe one rule's finding is; None when it has none."""
    found = found_in(subject)
    return found[name].severity if name in found else None
