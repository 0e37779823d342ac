"""`trivium plan --check`: errors computed by hand, runs without measurements, malformed files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import ConfigError
from trivium.plan.check import as_json, as_table, check, read_outcome


def write_run(folder: Path, plan: object = None, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("name: run\n")
    if plan is not None:
        (folder / "plan.json").write_text(json.dumps(plan))
    if finished:
        (folder / "finished.json").write_text("{}")
    return folder


def plan_of(gib: float, tokens_per_second: float, measured: tuple[float, float] | None = None) -> dict[str, Any]:
    """A plan with its predictions and measurements."""
    figures = {"bytes": gib * (1 << 30), "low": 0.9 * gib * (1 << 30), "high": 1.1 * gib * (1 << 30)}
    predicted = {
        "device": "a device",
        "is_calibrated": True,
        "peak_memory": {**figures, "what": "the peak", "instant": "in the loss", "items": {"weights": 1 << 30}},
        "speed": {"tokens_per_second": tokens_per_second, "low": 1.0, "high": 1e9},
        "time": {"hours": 2.0, "low": 1.0, "high": 3.0},
    }
    if measured is None:
        return {"predicted": predicted}
    return {
        "predicted": predicted,
        "measured": {"peak_memory_bytes": measured[0] * (1 << 30), "tokens_per_second": measured[1], "hours": 2.5},
    }


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        write_run(tmp_path / "over", plan_of(5, 900, measured=(4, 1000))),
        write_run(tmp_path / "under", plan_of(19, 210, measured=(20, 200))),
        write_run(tmp_path / "exact", plan_of(1, 70, measured=(1, 70))),
        write_run(tmp_path / "half", plan_of(9, 1, measured=(1, 9)), finished=False),
        write_run(tmp_path / "begun", plan_of(7, 3), finished=False),
        write_run(tmp_path / "old"),
    ]


def test_check_errors(runs):
    found = as_json(check(runs))
    errors = [(run["peak_memory_bytes"] or {}).get("error") for run in found["runs"]]
    assert errors == [0.25, pytest.approx(-0.05), 0.0, 8.0, None, None]
    assert found["peak_memory_bytes"] == {"median": pytest.approx(0.05), "worst": 0.25, "run": str(runs[0])}
    assert found["tokens_per_second"] == {
        "median": pytest.approx(0.05),
        "worst": pytest.approx(0.1),
        "run": str(runs[0]),
    }
    assert json.loads(json.dumps(found)) == found


def test_check_lists_runs_without_measurement(runs):
    outcomes = check(runs)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3 + ["unfinished"] * 2 + ["no plan"]
    lines = as_table(outcomes).splitlines()
    by_run = {Path(line.split()[0]).name: line for line in lines[1 : 1 + len(runs)]}
    assert by_run["half"].endswith("unfinished") and by_run["old"].endswith("no plan")
    assert "+25.0%" in by_run["over"] and "-5.0%" in by_run["under"] and "7.00" in by_run["begun"]
    assert lines[-2] == f"memory: median error 5.0%, worst 25.0% ({runs[0]})"
    assert lines[-1] == f"speed: median error 5.0%, worst 10.0% ({runs[0]})"


def test_check_without_measurements_has_no_summary(runs):
    outcomes = check(runs[3:])
    assert as_json(outcomes)["peak_memory_bytes"] is None
    assert "median" not in as_table(outcomes)


def test_check_refuses_other_folders(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere, .*elsewhere"):
        check([runs[0], tmp_path / "nowhere", tmp_path / "elsewhere"])


PLACES = [
    (),
    ("predicted",),
    ("measured",),
    ("predicted", "is_calibrated"),
    ("predicted", "peak_memory"),
    ("predicted", "peak_memory", "bytes"),
    ("predicted", "peak_memory", "items"),
    ("predicted", "peak_memory", "items", "weights"),
    ("predicted", "speed", "low"),
    ("predicted", "time"),
    ("measured", "peak_memory_bytes"),
    ("measured", "tokens_per_second"),
]
odd_values = st.sampled_from(
    [None, True, 0, -1, 1e300, math.nan, math.inf, "", "12", "x", [], [1], {}, {"a": 1}, {"a": None}]
)


@given(place=st.sampled_from(PLACES), value=odd_values)
def test_check_of_odd_plan_files(place, value, tmp_path_factory):
    plan: Any = {"": plan_of(1, 1, measured=(1, 1))}
    inner: Any = plan
    for key in ("", *place)[:-1]:
        inner = inner[key]
    inner[place[-1] if place else ""] = value
    folder = write_run(tmp_path_factory.mktemp("odd") / "run", plan[""])
    outcomes = check([folder])
    assert outcomes[0].status in ("finished", "no plan")
    shown = as_table(outcomes) + json.dumps(as_json(outcomes), allow_nan=False)
    assert "nan" not in shown


@pytest.mark.parametrize("content", [b"", b'{"predicted": {"dev', b"\xff\xfe\x00"])
def test_read_outcome_of_torn_file(content, tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "plan.json").write_bytes(content)
    assert read_outcome(folder).status == "no plan"
