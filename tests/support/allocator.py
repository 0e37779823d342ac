"""Measure what torch's CPU allocator gives out, to check the planner's formulas and the trace."""

import gc

from torch.profiler import ProfilerActivity, profile

from trivium.measure.synthetic import synthetic_batches, synthetic_engine
from trivium.plan.workload import Workload


def allocated_peak(work: Workload) -> int:
    """Peak bytes over building the engine and two optimizer steps; only the second starts with moments."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        engine = synthetic_engine(work)
        batches = synthetic_batches(work)
        for _ in range(2):
            engine.forward_backward(batches)
            engine.optimizer_step(1e-5, batches)
    assert events.profiler is not None and events.profiler.kineto_results is not None
    changes = [event for event in events.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
