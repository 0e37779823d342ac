"""Imports: samples that another program tokenised become a store with its mask, as a run file takes it.

Ids and labels are taken over as they are: nothing is rendered, proven or held out. Imported by `cli/data.py`.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trivium.data.chat.messages import FULL_WEIGHT
from trivium.data.store.encode import RejectedRow
from trivium.data.store.megatron import StoreWriter, mask_prefix
from trivium.data.store.mmap import read_padded_mmap
from trivium.data.store.partial import REJECTS
from trivium.data.tokenizer import token_dtype
from trivium.errors import BadData, ConfigError
from trivium.files import atomic_write, fsync_directory

UNSUPERVISED = "no supervised token"


def import_padded_mmap(folder: Path, out: Path) -> dict[str, Any]:
    """Write the samples of Qwen3-Coder's padded .mmap folder to the store `out`, and return its report.

    Rows without a supervised token (a first one is never predicted) are refused; `out/rejects.jsonl` lists them by
    their number. A run file takes the result as `store: OUT/tokens`.

    Raises: ConfigError when there is something at `out`, BadData when the folder is not such a set or teaches nothing.
    """
    if out.exists():
        raise ConfigError(f"{out}: there is something there already. Name a new folder; nothing is overwritten.")
    largest = max((int(ids.max()) for ids, _ in read_padded_mmap(folder)), default=0)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokens = StoreWriter(partial / "tokens", token_dtype(largest + 1))
    mask = StoreWriter(mask_prefix(partial / "tokens"), np.dtype(np.uint8))
    refused: list[RejectedRow] = []
    num_rows = num_supervised = 0
    with tokens, mask:
        for num_rows, (ids, supervised) in enumerate(read_padded_mmap(folder), start=1):
            if not supervised[1:].any():
                refused.append(RejectedRow(str(folder), num_rows, UNSUPERVISED, ""))
                continue
            lengths = np.array([len(ids)])
            tokens.add(ids.astype(tokens.dtype), lengths)
            mask.add(supervised.astype(np.uint8) * np.uint8(FULL_WEIGHT), lengths)
            num_supervised += int(supervised[1:].sum())
    if not tokens.num_documents:
        shutil.rmtree(partial)
        raise BadData(f"{folder}: none of its {num_rows:,} rows has a supervised token. Expected labels beside -100.")
    report = {
        "rows": num_rows,
        "kept": tokens.num_documents,
        "split": 0,
        "rejected": len(refused),
        "rejected_by_reason": dict(Counter(row.reason for row in refused)),
        "conversations": tokens.num_documents,
        "documents": tokens.num_documents,
        "tokens": tokens.num_tokens,
        "supervised_tokens": num_supervised,
    }
    (partial / REJECTS).write_text("".join(json.dumps(row._asdict()) + "\n" for row in refused))
    atomic_write(partial / "report.json", json.dumps(report, indent=2) + "\n")
    os.rename(partial, out)
    fsync_directory(out.parent)
    return report
