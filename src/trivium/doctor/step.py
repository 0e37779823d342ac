"""The rule that runs one forward and backward pass over the run's own data, without an optimizer step."""

import math

from trivium.doctor.findings import Rule, Violation
from trivium.doctor.prepared import LoadedRun
from trivium.engine.device import is_out_of_memory
from trivium.engine.engine import NonFinite
from trivium.engine.plan_record import suggest_fixes
from trivium.errors import TriviumError, first_lines
from trivium.plan.memory import peak_memory


def one_step(loaded: LoadedRun) -> Violation | None:
    """M04: a forward and backward pass over the first micro-batch that fails or has no gradient."""
    batch, engine = loaded.prepared.job.batches.step(0)[0], loaded.engine
    try:
        loss = engine.forward_backward([batch])["loss"]
        gradients = [p.grad for p in engine.parameters.values() if p.grad is not None]
        norm = math.sqrt(sum(float(g.float().pow(2).sum()) for g in gradients))
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        workload, machine = loaded.prepared.workload, loaded.prepared.machine
        limit = min(machine.memory_bytes, peak_memory(workload).total)
        return Violation(
            "error",
            f"the first micro-batch does not fit in the memory of {engine.device} ({first_lines(error)}).",
            "enough memory for one micro-batch.",
            f"one of these changes: {suggest_fixes(workload, machine, limit)}.",
        )
    except NonFinite as error:
        return _no_step(
            f"the first micro-batch gives a NaN or infinity: {error}.",
            "set precision: fp32, or start from other weights.",
        )
    finally:
        engine.optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(norm) or norm == 0.0:
        return _no_step(
            f"the first micro-batch has loss {loss:.4f} and gradient norm {norm}, so the model would not learn.",
            "check the weights that the run starts from, and which of them are trained.",
        )
    return None


def _no_step(found: str, fix: str) -> Violation:
    return Violation("error", found, "a finite loss and a gradient norm above zero.", fix)


RULES = (Rule[LoadedRun]("M04", "step", one_step, TriviumError),)
