"""Learning-rate schedules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.config.run import Schedule
from trivium.engine.optim import learning_rate

KINDS = ["cosine", "linear", "wsd", "constant"]


@given(
    st.sampled_from(KINDS),
    st.integers(1, 500),
    st.integers(0, 700),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.5),
    st.floats(0.0, 1.0),
)
def test_learning_rate_stays_between_zero_and_peak_and_ends_at_the_minimum(kind, num_steps, step, warmup, decay, floor):
    schedule = Schedule(kind=kind, warmup_ratio=warmup, decay_ratio=decay, min_lr_ratio=floor)
    rate = learning_rate(step, num_steps, 1.0, schedule)
    assert 0.0 <= rate <= 1.0 + 1e-12
    assert rate > 0.0 or floor == 0.0
    if step >= num_steps and kind != "constant" and not (kind == "wsd" and round(decay * num_steps) == 0):
        assert rate == pytest.approx(floor)


def test_learning_rate_at_the_ends_of_each_schedule():
    def rates(kind, **values):
        schedule = Schedule(kind=kind, warmup_ratio=0.1, decay_ratio=0.2, min_lr_ratio=0.1, **values)
        return [learning_rate(step, 100, 2.0, schedule) for step in range(130)]

    for kind in KINDS:
        assert rates(kind)[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
        assert rates(kind)[10] == pytest.approx(2.0)
    assert rates("constant")[10:] == [2.0] * 120
    for kind in ("cosine", "linear", "wsd"):
        assert rates(kind)[99:] == pytest.approx([0.2] * 31)
    assert rates("wsd")[10:81] == pytest.approx([2.0] * 71)
    assert rates("linear")[55] == pytest.approx(2.0 * (0.1 + 0.9 * (1 - 45 / 89)))
    assert all(a >= b for a, b in zip(rates("cosine")[10:], rates("cosine")[11:], strict=False))
