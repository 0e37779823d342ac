"""What Trivium writes means the same to transformers 4.57, which reads other keys of config.json than transformers 5.

The older version is installed once, into `.cache`, by pip: only the packages that differ, beside everything else here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.runs import adapt_values, run_values, train, write_conversations, write_corpus
from tests.support.qwen_tokenizers import CACHE
from trivium.files import FolderLock
from trivium.use.export import export

REQUIREMENTS = (
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface_hub==0.36.2",
    "requests==2.32.5",
    "urllib3==2.5.0",
    "charset-normalizer==3.4.4",
    "certifi==2025.10.5",
    "idna==3.11",
)
IDS = [[257, 76, 105, 108, 121, 32, 100, 114, 97, 119, 115, 258, 256, 10, 84, 111, 109]]
ADAPTER = {"rank": 4, "train_tokens": ["<|im_end|>"]}
PROGRAM = """
import json, sys
import torch, transformers
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, folders, out = json.loads(sys.argv[1])
found = {}
for name, (base, adapter) in folders.items():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    AutoTokenizer.from_pretrained(adapter or base).apply_chat_template([{"role": "user", "content": "x"}])
    with torch.no_grad():
        found[name] = model.eval()(input_ids=torch.tensor(ids)).logits
save_file(found, out)
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def older() -> Path:
    """A folder for PYTHONPATH with transformers 4.57 and what it pins."""
    folder = CACHE / "packages" / hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder.parent / "lock") as lock:
        lock.acquire(wait=True)
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", partial, *REQUIREMENTS], check=True)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, tuple[Path, Path | None]]:
    """Results and exports of tiny runs: the folder with config.json of each, and its adapter."""
    root = tmp_path_factory.mktemp("runs")
    corpus, chats = write_corpus(root / "stories.jsonl"), write_conversations(root / "chats.jsonl")
    few = {"budget": {"steps": 8}}
    train(run_values(corpus, root / "scratch", **few))
    scratch = root / "scratch" / "small" / "model"
    runs = {"full": {"method": "full"}} | {
        name: {"method": name, "adapter": ADAPTER, "optimizer": {"lr": 3e-2}} for name in ("lora", "qlora")
    }
    for name, values in runs.items():
        train(adapt_values(scratch, chats, root / name, **few | values))
    export(str(root / "full" / "small"), root / "full-copy", merge=False, dtype=None, note=str)
    for name in ("lora", "qlora"):
        export(str(root / name / "small"), root / f"{name}-merged", merge=True, dtype=None, note=str)
    export(str(root / "lora" / "small"), root / "lora-copy", merge=False, dtype=None, note=str)
    return {
        "scratch": (scratch, None),
        "full": (root / "full" / "small" / "model", None),
        "full exported": (root / "full-copy", None),
        "lora merged": (root / "lora-merged", None),
        "qlora merged": (root / "qlora-merged", None),
        "lora": (scratch, root / "lora" / "small" / "adapter"),
        "qlora": (scratch, root / "qlora" / "small" / "adapter"),
        "lora exported": (scratch, root / "lora-copy"),
    }


@pytest.mark.long
def test_older_transformers_computes_the_same(
    older: Path, written: dict[str, tuple[Path, Path | None]], tmp_path: Path
):
    folders = {name: [str(base), adapter and str(adapter)] for name, (base, adapter) in written.items()}
    asked = json.dumps([IDS, folders, str(tmp_path / "logits.safetensors")])
    environment = os.environ | {"PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4.57.6"]
    logits = load_file(tmp_path / "logits.safetensors")
    for name, (base, adapter) in written.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        with torch.no_grad():
            here = model.eval()(input_ids=torch.tensor(IDS)).logits
        assert (logits[name] - here).abs().max() < 1e-5, name
    assert (logits["lora merged"] - logits["lora"]).abs().max() < 1e-4
    for name in ("lora", "qlora", "full"):
        assert (logits[name] - logits["scratch"]).abs().max() > 0.01, name
