"""Build the engine of a prepared run: weights, adapter, trainable tokens, optimizer."""

from collections.abc import Collection

import torch

from trivium.engine.device import Machine
from trivium.engine.engine import Engine
from trivium.engine.prepare import Job
from trivium.engine.ranks import ALONE, Ranks
from trivium.errors import ConfigError
from trivium.model import adapter, hf, quantize
from trivium.model.qwen import Qwen, init_weights


def build_engine(job: Job, machine: Machine, ranks: Ranks = ALONE) -> Engine:
    """The engine with the run's initial weights on its device, and with its adapter if it has one."""
    run = job.run
    if run.adapter is None:
        model = Qwen(job.shape)
        if job.weights_folder is None:
            init_weights(model, run.seed)
        else:
            hf.load_weights(model, job.weights_folder)
        model.compute_dtype = machine.compute_dtype
        model.activation_checkpointing = bool(run.activation_checkpointing)
        return Engine(model.to(machine.device), run.optimizer, ranks=ranks)
    model = load_frozen(job, machine)
    model.activation_checkpointing = bool(run.activation_checkpointing)
    adapter.inject(model, run.adapter, run.seed, trained_tokens(job), job.weights_folder)
    return Engine(model, run.optimizer, run.adapter.loraplus_lr_ratio, ranks=ranks)


def load_frozen(job: Job, machine: Machine) -> Qwen:
    """The base model of an adapter, loaded directly in the compute dtype or NF4, without an fp32 copy."""
    assert job.weights_folder is not None
    with torch.device("meta"):
        model = Qwen(job.shape)
    if job.run.weights == "nf4":
        return quantize.load_quantized(model, job.weights_folder, machine.compute_dtype, machine.device)
    model = model.to(machine.compute_dtype).to_empty(device=machine.device)
    hf.load_weights(model, job.weights_folder)
    model.compute_dtype = machine.compute_dtype
    return model


def trained_tokens(job: Job) -> list[int]:
    """Ids of the trainable tokens: `adapter.train_tokens`, or by default the untrained control tokens in the data.

    Raises: ConfigError when the tokenizer lacks a token named in `adapter.train_tokens`.
    """
    assert job.run.adapter is not None
    named = job.run.adapter.train_tokens
    if named is None:
        control = control_tokens(job)
        return untrained_tokens(job, {token for store in job.built for token in store.find_control_tokens(control)})
    known = job.tokenizer.get_vocab()
    if unknown := [token for token in named if token not in known]:
        raise ConfigError(
            f"adapter.train_tokens names {unknown[0]!r}, which is not a token of {job.tokenizer_folder}. Write tokens "
            "as in the tokenizer's vocabulary, for example <|im_end|>."
        )
    return [known[token] for token in named]


def control_tokens(job: Job) -> list[int]:
    """Ids of the control tokens, for example the end of a turn."""
    return sorted(job.tokenizer.get_added_vocab().values())


def untrained_tokens(job: Job, used: Collection[int]) -> list[int]:
    """The control tokens among `used` that pretraining never trained.

    Reads only the rows of reserved tokens, from the embedding and from an untied head.
    """
    assert job.weights_folder is not None
    control = control_tokens(job)
    reserved = [*control, *range(len(job.tokenizer), job.shape.vocab_size)]
    places = [place for place, token in enumerate(control) if token in used]
    if not places:
        return []
    with torch.device("meta"):
        files = hf.find_tensors(Qwen(job.shape), job.weights_folder)
    names = [hf.EMBEDDINGS] if job.shape.tie_word_embeddings else [hf.EMBEDDINGS, hf.HEAD]
    embedding, *head = [hf.read_rows(files[name], name, reserved) for name in names]
    untrained = adapter.untrained_rows(embedding, head[0] if head else None, places, range(len(reserved)))
    return [reserved[place] for place in untrained]
