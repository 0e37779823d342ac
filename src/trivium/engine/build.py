"""Build the engine of a prepared run: weights, adapter, trainable tokens, optimizer."""

from trivium.engine.device import Machine
from trivium.engine.engine import Engine
from trivium.engine.prepare import Job
from trivium.engine.ranks import ALONE, Ranks
from trivium.model import adapter, hf, quantize
from trivium.model.qwen import Qwen, empty_model, init_weights


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
    adapter.inject(model, run.adapter, run.seed, job.trained_tokens, job.weights_folder)
    return Engine(model, run.optimizer, run.adapter.loraplus_lr_ratio, ranks=ranks)


def load_frozen(job: Job, machine: Machine) -> Qwen:
    """The base model of an adapter, loaded directly in the compute dtype or NF4, without an fp32 copy."""
    assert job.weights_folder is not None
    if job.run.weights == "nf4":
        model = empty_model(job.shape)
        return quantize.load_quantized(model, job.weights_folder, machine.compute_dtype, machine.device)
    return hf.load_model(job.shape, job.weights_folder, machine.compute_dtype, machine.device)
