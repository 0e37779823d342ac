"""A run that is killed at random instants and resumed ends with identical weights."""

import shutil
import time
from pathlib import Path
from random import Random

import pytest

from tests.engine.runs import finish, outcome, run_values, spawn, train, wait_until, write_corpus
from trivium.engine import checkpoint
from trivium.engine.loop import Silent
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError, TriviumError

KILLS, KILLS_INSIDE_A_SAVE = 10, 3
KILLS_OF_THE_LONG_TEST, KILLS_INSIDE_A_SAVE_OF_THE_LONG_TEST = 40, 15


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stories.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The outcome and the duration of the run without interruption."""
    runs_dir = tmp_path_factory.mktemp("whole")
    finish(run_values(corpus, runs_dir))
    shutil.rmtree(runs_dir / "small")
    start = time.monotonic()
    finish(run_values(corpus, runs_dir))
    return outcome(runs_dir), time.monotonic() - start


@pytest.fixture(scope="module")
def long_run(corpus, tmp_path_factory):
    """Settings of a run that is far from its end when a test has seen its first steps, and its outcome."""
    settings = {"budget": {"steps": 240}, "log": {"every_steps": 30}, "eval": {"every_steps": 60, "max_tokens": 1024}}
    runs_dir = tmp_path_factory.mktemp("long")
    finish(run_values(corpus, runs_dir, **settings, checkpoint={"every_steps": 20}))
    return settings, outcome(runs_dir)


def kill_at_random(values, rng: Random, seconds: float) -> None:
    process = spawn(values)
    time.sleep(rng.uniform(0.0, seconds))
    process.kill()
    process.join()


def kill_inside_a_save(values, rng: Random) -> bool:
    """Kill when a save has begun, some random moment into it; whether it was cut off there."""
    checkpoints = Path(values["runs_dir"]) / "small" / "checkpoints"
    process = spawn(values)
    num_saves = rng.randrange(1, 8)
    delay = rng.uniform(0.0, 0.002)
    while process.is_alive() and not (
        len(list(checkpoints.glob("step-*"))) >= min(num_saves, 2) and list(checkpoints.glob(".step-*.tmp"))
    ):
        pass
    time.sleep(delay)
    process.kill()
    process.join()
    return bool(list(checkpoints.glob(".step-*.tmp")))


def kill_and_finish(corpus: Path, uninterrupted, tmp_path: Path, kills: int, kills_inside_a_save: int) -> None:
    """Kill that many runs, every second one while it saves, and go on until that many were cut off inside a save."""
    expected, seconds = uninterrupted
    rng = Random(0)
    inside = trials = 0
    while trials < kills or inside < kills_inside_a_save:
        runs_dir = tmp_path / str(trials)
        values = run_values(corpus, runs_dir)
        if trials % 2:
            kill_at_random(values, rng, seconds)
        else:
            inside += kill_inside_a_save(values, rng)
        finish(values)
        assert outcome(runs_dir) == expected, f"trial {trials}"
        shutil.rmtree(runs_dir)
        trials += 1
        assert trials < 120, f"only {inside} of {trials} kills fell inside a save"
    print(f"{trials} kills, {inside} of them inside a save: all {trials} runs ended with the same bits")


def test_ten_kills_end_with_the_same_bits(corpus, uninterrupted, tmp_path):
    kill_and_finish(corpus, uninterrupted, tmp_path, KILLS, KILLS_INSIDE_A_SAVE)


@pytest.mark.long
def test_forty_kills_end_with_the_same_bits(corpus, uninterrupted, tmp_path):
    counts = KILLS_OF_THE_LONG_TEST, KILLS_INSIDE_A_SAVE_OF_THE_LONG_TEST
    kill_and_finish(corpus, uninterrupted, tmp_path, *counts)


def test_run_killed_repeatedly_ends_with_the_same_bits(corpus, uninterrupted, tmp_path):
    expected, seconds = uninterrupted
    values = run_values(corpus, tmp_path)
    rng = Random(1)
    for _ in range(6):
        kill_at_random(values, rng, seconds)
    finish(values)
    assert outcome(tmp_path) == expected


def test_sigterm_finishes_the_step_saves_and_exits_75(corpus, long_run, tmp_path):
    settings, expected = long_run
    values = run_values(corpus, tmp_path, **settings, checkpoint={"every_steps": 1000})
    folder = RunFolder(tmp_path / "small")
    process = spawn(values)
    wait_until(lambda: len(list(folder.ledger)) >= 5, process)
    process.terminate()
    process.join()
    # The raw process has no command line to turn Stopped into 75; that is tests/cli/test_train.py.
    assert process.exitcode == 1
    stopped_at = checkpoint.steps(folder.checkpoints)[0]
    assert 5 <= stopped_at < 240
    assert [record["step"] for record in folder.ledger] == list(range(1, stopped_at + 1))
    finish(values)
    assert outcome(tmp_path) == expected


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_resume_from_the_checkpoint_before_a_damaged_one(corpus, long_run, tmp_path, damage):
    settings, expected = long_run
    values = run_values(corpus, tmp_path, **settings, checkpoint={"every_steps": 20})
    process = spawn(values)
    folder = RunFolder(tmp_path / "small")
    wait_until(lambda: len(checkpoint.steps(folder.checkpoints)) >= 2, process)
    process.kill()
    process.join()
    newest, before = checkpoint.steps(folder.checkpoints)[:2]
    file = checkpoint.step_folder(folder.checkpoints, newest) / "model.safetensors"
    content = bytearray(file.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[:-1])
        case "missing":
            file.unlink()
    notes = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    train(values, Noting())
    assert any("set aside a damaged checkpoint" in note and f"step-{newest:08d}" in note for note in notes)
    assert any(f"resumed after step {before}" in note for note in notes)
    assert outcome(tmp_path) == expected


def test_run_folder_lock_refuses_a_second_run(corpus, tmp_path):
    values = run_values(corpus, tmp_path, budget={"steps": 100_000})
    process = spawn(values)
    wait_until(lambda: list((tmp_path / "small" / "checkpoints").glob("step-*")), process)
    with pytest.raises(TriviumError, match=f"in use by process {process.pid}"):
        train(values)
    process.kill()
    process.join()


def test_finished_run_is_not_trained_again(corpus, tmp_path):
    values = run_values(corpus, tmp_path, budget={"steps": 3})
    train(values)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*") if path.name != "lock"}
    train(values)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "small").rglob("*") if path.name != "lock"}
    assert {p for p in before if before[p] != after[p]} <= {tmp_path / "small"}


def test_resume_with_changed_settings_is_refused(corpus, tmp_path):
    train(run_values(corpus, tmp_path, budget={"steps": 3}))
    changed = run_values(corpus, tmp_path, budget={"steps": 4}, seed=9)
    with pytest.raises(ConfigError, match=r"(?s)budget\.steps.*3.*4.*seed.*0.*9"):
        train(changed)


def test_resume_with_changed_data_is_refused(corpus, tmp_path):
    own = write_corpus(tmp_path / "own.jsonl")
    values = run_values(own, tmp_path, budget={"steps": 100_000})
    process = spawn(values)
    wait_until(lambda: list((tmp_path / "small" / "checkpoints").glob("step-*")), process)
    process.kill()
    process.join()
    text = own.read_text()
    own.write_text(text.replace("fox", "ape"))  # as many tokens as before
    with pytest.raises(ConfigError, match="has changed since step"):
        train(values)
    assert not (tmp_path / "small" / "failure.json").exists()
