"""Trackers: each tracker's reader finds every metric once, also after a kill; no API key is written."""

import json
import os
import sqlite3
import struct
from importlib import import_module
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import rewrite_logs

from tests.engine.runs import run_values, train, write_corpus
from tests.support.processes import context
from trivium.engine import trackers
from trivium.engine.loop import Silent
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError

SECRET = "s3cr3t00" * 5
CONFIG = {"optimizer": {"lr": 1e-3}}
LINES = [
    {"step": step, "time": "2026-01-01T00:00:00+00:00", "train/loss": 3.0 - step / 100, "train/epoch": step / 50}
    for step in (10, 20, 30, 40, 50)
]
EVALUATIONS = [{"step": step, "time": "", "eval/loss": 2.5 - step / 100} for step in (0, 20, 40)]
RECORDS = sorted(LINES + EVALUATIONS, key=lambda record: record["step"])


def figures(records: list) -> dict:
    """What trackers should hold; values are kept as 32-bit floats by some."""
    return {
        (name, record["step"]): pytest.approx(value)
        for record in records
        for name, value in record.items()
        if "/" in name
    }


def variables(folder: Path) -> dict[str, str]:
    home = str(folder.parents[1] / "home")
    return {"HOME": home, "TRACKIO_DIR": f"{home}/trackio", "WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "story"
    for name, value in variables(folder).items():
        monkeypatch.setenv(name, value)
    folder.mkdir(parents=True)
    return folder


def start(name: str, folder: Path, records: list, config: dict = CONFIG, killed: bool = False) -> None:
    """One process of a run: its records go to the tracker, and then it ends or is killed."""
    os.environ.update(variables(folder))  # the fork server's are those of an earlier test
    opened = trackers.open_trackers([name], folder, "story", config, Silent())
    for record in records:
        opened.record(record)
    if killed:
        os._exit(9)
    opened.close()


def process(*arguments, **options) -> None:
    child = context.Process(target=start, args=arguments, kwargs=options)
    child.start()
    child.join()
    assert child.exitcode == (9 if options.get("killed") else 0)


def read_tensorboard(folder: Path) -> list:
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder / "tensorboard"), purge_orphaned_data=False
    )
    accumulator.Reload()
    events = [(tag, event) for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)]
    return sorted((tag, event.step, event.value) for tag, event in events)


def read_wandb(folder: Path) -> list:
    """A .wandb file is a log of records, each after 4 bytes of checksum, 2 of length, 1 of kind (1: whole)."""
    message = import_module("wandb.proto.wandb_internal_pb2").Record
    found, ids = [], set()
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        ids.add(path.stem)
        log, at = path.read_bytes(), 7
        while at < len(log):
            length, kind = struct.unpack_from("<HB", log, at + 4)
            assert kind == 1
            record = message.FromString(log[at + 7 : at + 7 + length])
            at += 7 + length
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                step = items.pop("train/global_step")
                found += [(name, step, value) for name, value in items.items() if not name.startswith("_")]
    assert len(ids) == 1, "the tracker's run is another one after a resume"
    return sorted(found)


def read_trackio(folder: Path) -> list:
    with sqlite3.connect(folder.parents[1] / "home" / "trackio" / "trivium.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    figures = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert all(found.pop("train/global_step") == step for step, found in figures)
    return sorted((name, step, value) for step, found in figures for name, value in found.items())


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("name", READERS)
def test_trackers_hold_every_metric_once_after_kill_and_resume(environment, name):
    pytest.importorskip(name)
    process(name, environment, RECORDS[:3])
    process(name, environment, RECORDS[2:6], killed=True)
    process(name, environment, RECORDS[4:])
    found = READERS[name](environment)
    assert [one[:2] for one in found] == sorted({one[:2] for one in found}), "a step was written twice"
    # trackio and wandb write in the background: a kill costs what they had not written, and nothing else.
    expected = figures(RECORDS) if name == "tensorboard" else figures(RECORDS[:3] + RECORDS[6:])
    by_step = {(one, step): value for one, step, value in found}
    assert {key: by_step.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", READERS)
def test_trackers_write_no_keys_and_open_no_ports(environment, name, tmp_path):
    pytest.importorskip(name)
    sockets = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
    before = {line.split()[1] for path in sockets for line in path.read_text().splitlines() if line.split()[3] == "0A"}
    opened = trackers.open_trackers([name], environment, "story", CONFIG, Silent())
    opened.record(RECORDS[0])
    after = {line.split()[1] for path in sockets for line in path.read_text().splitlines() if line.split()[3] == "0A"}
    opened.close()
    assert after <= before
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_trackers_start_a_new_run_for_another_config(environment):
    pytest.importorskip("tensorboard")
    start("tensorboard", environment, RECORDS)
    start("tensorboard", environment, RECORDS[:1], config={"optimizer": {"lr": 1e-4}})
    assert read_tensorboard(environment) == [("eval/loss", 0, 2.5)]


def test_require_trackers_refuses_missing_packages(monkeypatch):
    trackers.require_trackers([])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackio, which cannot be imported.*trivium\[track\]"):
        trackers.require_trackers(["trackio"])


def test_trackers_without_names_write_no_file(environment):
    opened = trackers.open_trackers([], environment, "story", CONFIG, Silent())
    opened.record(RECORDS[0])
    opened.close()
    assert not list(environment.iterdir())


def test_trackers_use_the_metric_names_of_the_trainer(tmp_path):
    pytest.importorskip("tensorboard")
    values = run_values(write_corpus(tmp_path / "stories.jsonl"), tmp_path / "runs")
    train({**values, "log": {"every_steps": 3, "trackers": ["tensorboard"]}})
    folder = RunFolder(tmp_path / "runs" / "small")
    found = read_tensorboard(folder.path)
    assert {(name, step): value for name, step, value in found} == figures(list(folder.metrics))
    trainer_logs = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "epoch": 1.0, "eval_loss": 1.0}
    assert set(rewrite_logs(trainer_logs)) <= {name for name, _, _ in found}
