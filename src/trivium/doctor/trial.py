"""Rules that try the engine itself on the run's own data: a step, a checkpoint, isolation of documents, the loss.

They cost a loaded model and a few passes, so only `trivium doctor` asks them. Each leaves the engine without gradients;
none takes an optimizer step. Imported by `examine.py`.
"""

import math
import shutil
import time
from collections.abc import Sequence

import numpy as np
import torch

from trivium.data.batch.pack import Batch, pack
from trivium.doctor.case import Trial, spread
from trivium.doctor.findings import Rule, Trouble
from trivium.engine.device import is_out_of_memory
from trivium.engine.engine import Engine, NonFinite
from trivium.engine.plan_record import suggest_fixes
from trivium.errors import TriviumError
from trivium.model.qwen import Documents
from trivium.plan.memory import peak_memory

LOOKED_AT_DOCUMENTS = 64
LEAK_TOKENS = 64
COMPARED_VALUES = 1 << 22
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def one_step(trial: Trial) -> Trouble | None:
    """M04: a forward and backward pass over the first micro-batch."""
    batch, engine = trial.case.job.batches.step(0)[0], trial.engine
    start = time.perf_counter()
    try:
        loss = engine.forward_backward([batch])["loss"]
        norm = math.sqrt(sum(float(g.float().pow(2).sum()) for g in gradients(engine).values()))
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        workload, machine = trial.case.workload, trial.case.machine
        limit = min(machine.memory_bytes, peak_memory(workload).total)
        return Trouble(
            "error",
            f"the first micro-batch does not fit into the memory of {engine.device} "
            f"({(str(error) or type(error).__name__).splitlines()[0][:200]}).",
            "room for the activations of one micro-batch.",
            f"one of the cheapest changes that need less: {suggest_fixes(workload, machine, limit)}.",
        )
    except NonFinite as error:
        return _no_step(f"the first micro-batch gives no numbers: {error}.", "use other weights, or precision: fp32.")
    finally:
        engine.optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(norm) or norm == 0.0:
        seconds = time.perf_counter() - start
        return _no_step(
            f"the first micro-batch has loss {loss:.4f} and a gradient of norm {norm} after {seconds:.1f} s: nothing "
            "would be learnt.",
            "look at the weights the run starts from and at what of them is trained.",
        )
    return None


def _no_step(found: str, todo: str) -> Trouble:
    return Trouble("error", found, "a finite loss and a gradient above zero.", todo)


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The gradients of what is trained, by name."""
    return {name: p.grad for name, p in engine.parameters.items() if p.grad is not None}


def saved_and_loaded(trial: Trial) -> Trouble | None:
    """M05: a checkpoint that is written, read back after its values were changed, and written again the same."""
    engine, folders = trial.engine, [trial.folder / name for name in ("first", "second")]
    state = {"doctor": True}
    try:
        engine.save(folders[0], state)
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.add_(1.0)
        engine.load(folders[0])
        engine.save(folders[1], state)
        same = len({(folder / "manifest.json").read_bytes() for folder in folders}) == 1
        found = "what was read back is not what was written"
    except TriviumError as error:
        same, found = False, str(error).rstrip(".")
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    if same:
        return None
    return Trouble(
        "error",
        f"a checkpoint does not survive in {trial.folder.parent}: {found}.",
        "the same bytes after writing, reading and writing again.",
        "look at the disk, or set runs_dir to another one.",
    )


def leaking_documents(trial: Trial) -> Trouble | None:
    """Q24: a change in one document of a row must not be felt in the next."""
    stores = trial.case.job.batches.stores
    documents = _documents(trial)
    pair = [documents[0], documents[-1]]
    lengths = [min(LEAK_TOKENS, int(stores[source].lengths[document])) for source, document in pair]
    spans = np.array([[*which, 0, length] for which, length in zip(pair, lengths, strict=True)], dtype=np.int64)
    batch = pack(stores, spans, sum(lengths))
    changed = batch.tokens.clone()
    changed[: lengths[0]] = (changed[: lengths[0]] + 1) % trial.case.job.shape.vocab_size
    before, after = (hidden_states(trial.engine, batch, tokens)[lengths[0] :] for tokens in (batch.tokens, changed))
    if torch.equal(before, after):
        return None
    return Trouble(
        "error",
        "two documents share a row, and changing the first changes what the model computes for the second by up to "
        f"{float((before - after).abs().max()):.2g}.",
        "documents in a row that never see each other.",
        "this is a fault of Trivium's attention on this device, not of your data; report it with versions and device.",
    )


def _documents(trial: Trial) -> list[tuple[int, int]]:
    """(source, document) of some documents that have a label, spread over all stores."""
    stores = trial.case.job.batches.stores
    found = []
    for source, store in enumerate(stores):
        longer = np.flatnonzero(np.asarray(store.lengths) > 1)
        found += [
            (source, int(longer[place])) for place in spread(len(longer), LOOKED_AT_DOCUMENTS // len(stores) or 1)
        ]
    return found


@torch.no_grad()
def hidden_states(engine: Engine, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """What the network makes of some tokens laid out as a batch says, [tokens, hidden]."""
    engine.model.eval()
    documents = Documents(batch.cu_seqlens.to(engine.device), batch.bounds, batch.max_document_tokens)
    return engine.model(tokens.to(engine.device), batch.positions.to(engine.device), documents)


def mean_of_means(trial: Trial) -> Trouble | None:
    """Q25: two unequal micro-batches must give the gradient that one batch of both gives."""
    rows = trial.case.job.batches
    empty = [step for step in {0, trial.case.job.num_steps - 1} if not sum(b.num_supervised for b in rows.step(step))]
    if empty:
        return _wrong_norm(f"step {1 + empty[0]:,} reads no token that carries loss.")
    long, short = _unequal_spans(trial)
    seq_len = trial.case.run.data.seq_len
    apart = [pack(rows.stores, span[None], seq_len) for span in (long, short)]
    joined = [pack(rows.stores, np.stack([long, short]), 2 * seq_len)]
    ours, whole = (_some_gradients(trial.engine, batches) for batches in (apart, joined))
    error = float((ours - whole).norm() / whole.norm().clamp(min=1e-30))
    if error <= GRADIENT_TOLERANCE[trial.case.machine.compute_dtype]:
        return None
    counts = " and ".join(f"{batch.num_supervised:,}" for batch in apart)
    return _wrong_norm(
        f"the gradient of micro-batches with {counts} learnt tokens differs by {error:.1%} from that of both in one."
    )


def _wrong_norm(found: str) -> Trouble:
    return Trouble(
        "error",
        found,
        "a step's loss divided by the weight of all its learnt tokens, so that each counts alike wherever it stands.",
        "this is a fault of Trivium, not of your data; report it with versions and device.",
    )


def _unequal_spans(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """Two pieces of documents, int64 [4] each: one with many learnt tokens, one with at most a quarter of that."""
    stores, seq_len = trial.case.job.batches.stores, trial.case.run.data.seq_len
    spans = [
        np.array([source, document, 0, min(seq_len, int(stores[source].lengths[document]))], dtype=np.int64)
        for source, document in _documents(trial)
    ]
    counts = [pack(stores, span[None], seq_len).num_supervised for span in spans]
    long = spans[int(np.argmax(counts))]
    short = spans[min((n for n in range(len(spans)) if counts[n]), key=lambda n: counts[n])].copy()
    labels = pack(stores, short[None], seq_len).labels.numpy()
    places = np.flatnonzero(labels >= 0)
    short[2] += places[-max(1, len(places) // 4)]
    return long, short


def _some_gradients(engine: Engine, batches: Sequence[Batch]) -> torch.Tensor:
    """The gradient of a step over some batches, one fp32 vector of the smaller trained tensors."""
    try:
        engine.forward_backward(batches)
        chosen: list[torch.Tensor] = []
        for gradient in sorted(gradients(engine).values(), key=torch.Tensor.numel):
            if chosen and sum(map(torch.Tensor.numel, chosen)) + gradient.numel() > COMPARED_VALUES:
                break
            chosen.append(gradient.float().flatten().clone())
        return torch.cat(chosen)
    finally:
        engine.optimizer.zero_grad(set_to_none=True)


def masters_in_fp32(trial: Trial) -> Trouble | None:
    """Q22: trained weights kept in 16 bits, where small updates vanish."""
    coarse = [name for name, p in trial.engine.parameters.items() if p.dtype != torch.float32]
    if not coarse:
        return None
    return Trouble(
        "error",
        f"{len(coarse):,} trained tensors are kept in 16 bits, such as {coarse[0]}.",
        "fp32: in bf16 an update of less than 2^-9 of a weight is lost.",
        "this is a fault of Trivium's engine, not of your run; report it with the run file.",
    )


STATE_RULES = (Rule[Trial]("Q22", "precision", masters_in_fp32),)
STEP_RULES = (Rule[Trial]("M04", "step", one_step, TriviumError),)
PROMISE_RULES = (
    Rule[Trial]("Q24", "packing-leak", leaking_documents, TriviumError),
    Rule[Trial]("Q25", "loss-norm", mean_of_means, TriviumError),
    Rule[Trial]("M05", "save-load", saved_and_loaded, TriviumError),
)
