"""Full and adapter fine-tuning have the same loss as TRL and PEFT at every step.

TRL gets the conversations of each of our steps as padded rows with our labels, so the comparison covers the network,
loss, gradients, clipping, AdamW and the adapter. These intended differences are made equal for the test:

- Masks. TRL's template for Qwen3 trains the empty think block that serving puts into the prompt; we do not. TRL takes
  labels of 0 or 1; ours may have weights.
- Order. TRL shuffles rows and takes equally many a step; we fill steps with tokens. Its sampler is made sequential, and
  one item of its data set holds one step of ours.
- Rate. A warm-up of the Trainer begins with a step at rate 0, ours does not. It is given our schedule.
- Precision. TRL computes in bf16 unless told otherwise, and PEFT keeps an adapter's products in fp32 where ours follow
  the base. Both run in fp32.
- First values. PEFT draws A from torch's global generator; ours depends on the seed and the tensor's name. TRL starts
  from our adapter as we save it.

What is left are sums in another order: attention over packed and over padded rows, a loss in chunks of rows and in
tiles of the vocabulary. They make about 1e-5 nats in 50 steps.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.support.models import small_model, small_shape
from trivium.config.run import Run, with_method_defaults
from trivium.data.batch.pack import Batch
from trivium.data.tokenizer import train_tokenizer
from trivium.engine.build import build_engine
from trivium.engine.device import Machine
from trivium.engine.optim import learning_rate
from trivium.engine.prepare import Job, prepare
from trivium.model import adapter, hf
from trivium.quickstart.grammar import story

STEPS = 50
TOLERANCE_NATS = 1e-3
# At twice these rates training turns chaotic: the last bit of step 0 is the second digit of step 50.
RATES = {"full": 5e-4, "lora": 4e-3}
PAD_ID = 0


def chat(rng: Random) -> dict[str, Any]:
    """One to three turns cut from a story; some have a system prompt, some an answer without loss."""
    words = story(rng).text.split()
    messages = [{"role": "system", "content": "Tell a story."}] if rng.random() < 0.3 else []
    for turn in range(rng.randint(1, 3)):
        for role in ("user", "assistant"):
            words, said = words[8:], words[: rng.randint(2, 8)]
            messages.append({"role": role, "content": " ".join(said)})
        if turn and rng.random() < 0.3:
            messages[-1]["train"] = False
    return {"messages": messages}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3 with weights large enough for gradients that matter, its tokenizer, and chats.jsonl."""
    folder = tmp_path_factory.mktemp("base")
    rng = Random(0)
    train_tokenizer([story(rng).text for _ in range(300)], "bpe", 600, folder / "tokenizer")
    model = small_model(small_shape(vocab_size=640, hidden_size=64, intermediate_size=128), scale=2.0)
    hf.save_folder(model, folder / "model", folder / "tokenizer", torch.float32)
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat(rng)) + "\n" for _ in range(400)))
    return folder


def run_of(method: str, base: Path, runs_dir: Path) -> Run:
    values = {
        "method": method,
        "name": "parity",
        "model": str(base / "model"),
        "data": {"sources": [str(base / "chats.jsonl")], "seq_len": 128, "held_out": 0.0, "workers": 1},
        "optimizer": {"lr": RATES[method], "weight_decay": 0.1, "beta2": 0.99, "max_grad_norm": 0.5},
        "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        "budget": {"steps": STEPS},
        "batch": {"tokens": 512, "micro_tokens": 256},
        "runs_dir": str(runs_dir),
    }
    return Run.model_validate(with_method_defaults(values))


def rate(run: Run, step: int) -> float:
    return learning_rate(step, STEPS, run.optimizer.lr, run.schedule)


def rows_of(batches: list[Batch]) -> Iterator[dict[str, list[int]]]:
    """The conversations of a step, with TRL's labels: a token's own id where we train to predict it, else -100."""
    for batch in batches:
        assert batch.supervised_weights is None
        for (begin, end), _ in zip(pairwise(batch.bounds), batch.spans, strict=False):
            ids, labels = batch.tokens[begin:end].tolist(), batch.labels[begin:end].tolist()
            assert labels[-1] == -100
            yield {"input_ids": ids, "labels": [-100, *labels[:-1]]}


def train_here(job: Job, folder: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of our engine; its first weights go to `folder`, as an adapter where one is trained."""
    engine = build_engine(job, Machine(torch.device("cpu"), torch.float32, 1.0, memory_bytes=8 << 30))
    if job.run.adapter is not None:
        adapter.save(engine.model, folder, str(job.weights_folder), None, {})
    losses, norms = [], []
    for step in range(STEPS):
        batches = job.batches.step(step)
        losses.append(engine.forward_backward(batches)["loss"])
        norms.append(engine.optimizer_step(rate(job.run, step), batches))
    return losses, norms


class SameRate(SFTTrainer):
    """SFTTrainer with our schedule, and the loss of each step unrounded."""

    run: Run

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        peak = self.run.optimizer.lr
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rate(self.run, step) / peak)
        self.losses: list[float] = []
        return self.lr_scheduler

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def train_there(job: Job, folder: Path, output: Path) -> tuple[list[float], list[float]]:
    """The same from TRL, and for an adapter from stock PEFT."""
    model = AutoModelForCausalLM.from_pretrained(job.weights_folder, dtype=torch.float32)
    if job.run.adapter is not None:
        model = PeftModel.from_pretrained(model, folder, is_trainable=True)
    optimizer = job.run.optimizer
    pad = DataCollatorForLanguageModeling(pad_token_id=PAD_ID)
    trainer = SameRate(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=1,
            max_steps=STEPS,
            train_sampling_strategy="sequential",
            learning_rate=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_epsilon=optimizer.eps,
            max_grad_norm=optimizer.max_grad_norm,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"rows": [*rows_of(job.batches.step(step))]} for step in range(STEPS)]),
        processing_class=AutoTokenizer.from_pretrained(job.tokenizer_folder),
        data_collator=lambda steps: pad(steps[0]["rows"]),
    )
    trainer.run = job.run
    trainer.train()
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    return trainer.losses, norms


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_step_matches_the_loss_of_trl_and_peft(method: str, base: Path, tmp_path: Path) -> None:
    job = prepare(run_of(method, base, tmp_path), note=lambda _: None)
    ours, our_norms = train_here(job, tmp_path / "first")
    theirs, their_norms = train_there(job, tmp_path / "first", tmp_path / "trl")
    assert len(theirs) == STEPS
    assert ours[-1] < ours[0] - 1.0, "the loss did not decrease, so the comparison shows nothing"
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < TOLERANCE_NATS
    assert our_norms == pytest.approx(their_norms, rel=1e-3)
