"""report.html: self-contained, safe, right in its numbers, and there for every state a run folder can be in."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from trivium.cli.report import report
from trivium.errors import TriviumError
from trivium.files import FolderLock
from trivium.report.html import write_report

from .conftest import RUN_YAML, write_lines

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """What a browser would see: tags, attributes, identifiers, text; balanced, or it fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


def read(path: Path) -> Page:
    """The page, after the checks that hold for every report: nothing fetched, nothing executed, identifiers unique."""
    page = Page(path)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    references = re.findall(r'(?:href="|url\()#([^")]+)', path.read_text(encoding="utf-8"))
    assert set(references) <= set(identifiers)
    assert not re.search(r"@import|url\((?!#)", path.read_text(encoding="utf-8"))
    return page


def test_a_finished_run_shows_its_numbers(finished_run: Path) -> None:
    path = write_report(finished_run)
    page = read(path)
    assert path == finished_run / "report.html"
    assert page.tags.count("svg") == 5
    last_loss = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/loss"] for line in last_loss if "eval/loss" in line][-1]
    for words in (
        "finished",
        "scratch",
        "qwen3, 4 layers of width 128, vocabulary 2048",
        "1,049,984",
        "600 of 600",
        "2,457,600",
        f"{held_out:.4f}",
        "3.1 min",
        "MFU = (k * block parameters",
        "1.30 GiB",
        "step-00000300, step-00000600",
        '"num_params": 1049984',
        RUN_YAML,
    ):
        assert words in page.text, words
    samples = page.text[page.text.index("Samples during training") :]
    assert samples.count("Once upon a time") == 1 and "pan pan" in samples  # the prompt once, above all texts
    assert re.findall(r"step (\d+)", samples) == ["0", "120", "360", "600"]


def test_report_shows_plan_and_measurements(finished_run: Path) -> None:
    assert "Plan" not in read(write_report(finished_run)).text.splitlines()
    peak = {"bytes": 3 << 30, "low": 2 << 30, "high": 4 << 30, "instant": "in the <loss>", "what": "the peak & all"}
    predicted = {
        "device": "card <7>",
        "is_calibrated": False,
        "peak_memory": peak | {"items": {"weights": 1 << 30, "moments": 2 << 30}},
        "speed": {"tokens_per_second": 5000, "low": 4000, "high": 8000},
        "time": {"hours": 2, "low": 1.25, "high": 2.5},
    }
    (finished_run / "plan.json").write_text(json.dumps({"predicted": predicted}))
    page = read(write_report(finished_run))
    for words in (
        "3.00 GiB predicted (2.00 to 4.00 GiB)",
        "card <7>",
        "in the <loss>",
        "moments 2.00, weights 1.00",
    ):
        assert words in page.text, words
    assert "measured;" not in page.text
    measured = {"peak_memory_bytes": 4 << 30, "tokens_per_second": 4000, "hours": 2.5}
    (finished_run / "plan.json").write_text(json.dumps({"predicted": predicted, "measured": measured}))
    page = read(write_report(finished_run))
    for words in (
        "4.00 GiB measured; predicted 25.0% too low",
        "4,000 tokens/s measured; predicted 25.0% too high",
        "2.5 h measured; predicted 20.0% too low",
    ):
        assert words in page.text, words


def test_plots_only_use_theme_colors(finished_run: Path) -> None:
    drawn = re.findall(r"<svg.*?</svg>", write_report(finished_run).read_text(), flags=re.DOTALL)
    assert len(drawn) == 5
    for svg in drawn:
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
        assert "var(--train)" in svg


@pytest.mark.parametrize(
    ("loss", "floor", "words"),
    [(0.69, 0.6, "15.0% above the floor"), (0.6, 0.6, "0.0% above the floor"), (0.57, 0.6, "5.0% below the floor")],
)
def test_the_floor_is_drawn_with_the_distance_from_it(tmp_path: Path, loss: float, floor: float, words: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    lines = [{"step": 1, "train/loss": 7.0}, {"step": 5, "eval/loss": 2.0}, {"step": 9, "eval/loss": loss}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "floor.json").write_text(json.dumps({"nats_per_token": floor, "what": "the {grammar} & <its> entropy"}))
    path = write_report(tmp_path)
    page, svg = read(path), path.read_text().partition("<svg")[2]
    assert page.text.count(words) == 2, "in the summary and in the plot"
    assert words in svg and "var(--floor)" in svg and f"floor {floor:.3f}" in svg
    assert "the {grammar} & <its> entropy" in page.text


def test_without_a_held_out_loss_no_distance_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "train/loss": 0.7}])
    (tmp_path / "floor.json").write_text(json.dumps({"nats_per_token": 0.6}))
    page = read(write_report(tmp_path))
    assert "no held-out loss yet" in page.text and "above" not in page.text


def test_report_escapes_hostile_text(finished_run: Path) -> None:
    hostile = (
        "</blockquote></style><script>alert('x')</script><img src=//evil onerror=\"go()\"> &lt; {0} %s \x00 \u202e"
    )
    write_lines(finished_run / "samples.jsonl", [{"step": 3, "prompt": hostile, "text": hostile}])
    (finished_run / "run.yaml").write_text(f"name: x\nmethod: {json.dumps(hostile)}\nmodel: {json.dumps(hostile)}\n")
    (finished_run / "failure.json").write_text(json.dumps({"kind": hostile, "message": hostile, "step": 3}))
    (finished_run / "floor.json").write_text(json.dumps({"nats_per_token": 0.6, "what": hostile}))
    (finished_run / "checkpoints" / "step-<script>").mkdir()
    page = read(write_report(finished_run))
    visible = hostile.replace("\x00", "")
    assert page.text.replace("\x00", "").replace("\ufffd", "").count(visible) >= 6


def test_report_of_an_empty_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    page = read(write_report(tmp_path))
    assert "stopped" in page.text and "not recorded" in page.text and "svg" not in page.tags
    assert (
        "Missing from the folder: provenance.json, metrics.jsonl, samples.jsonl, checkpoints, the result." in page.text
    )


def test_report_of_torn_records(finished_run: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (finished_run / name).read_text()
        (finished_run / name).write_text(whole[: len(whole) * 2 // 3])
    odd = [
        '{"step": 1, "train/loss": NaN, "train/mfu": Infinity}\n',
        '["no object"]\n',
        '{"train/loss": 1.0}\n',
        "null\n",
    ]
    (finished_run / "metrics.jsonl").write_text("".join(odd) + (finished_run / "metrics.jsonl").read_text())
    (finished_run / "finished.json").unlink()
    (finished_run / "provenance.json").write_text('{"model": {"num_par')
    (finished_run / "floor.json").write_text('{"nats_per_token": NaN}')
    (finished_run / "run.yaml").write_text("method: [unclosed")
    page = read(write_report(finished_run))
    assert page.tags.count("svg") == 5
    assert "method: [unclosed" in page.text and "step 120" in page.text and "step 600" not in page.text
    assert not re.search(r"floor|\bnan\b|\binf\b", page.text, flags=re.IGNORECASE)


def test_a_crashed_run_shows_its_failure_first(finished_run: Path) -> None:
    (finished_run / "finished.json").unlink()
    failure = {"kind": "not finite", "step": 412, "message": "Stopped before the update of step 412: the loss is nan."}
    (finished_run / "failure.json").write_text(json.dumps(failure))
    text = read(write_report(finished_run)).text
    assert "failed" in text
    assert text.index("not finite at step 412") < text.index(failure["message"]) < text.index("Summary")


def test_report_tells_running_from_killed_runs(finished_run: Path) -> None:
    (finished_run / "finished.json").unlink()
    lock = FolderLock(finished_run / "lock")
    lock.acquire(wait=False)
    assert "The run is in progress" in read(write_report(finished_run)).text
    lock.release()
    assert "no process is running it" in read(write_report(finished_run)).text


def test_report_is_reproducible(finished_run: Path) -> None:
    assert write_report(finished_run).read_bytes() == write_report(finished_run).read_bytes()


def test_the_command_prints_the_path(finished_run: Path) -> None:
    result = CliRunner().invoke(report, [str(finished_run)])
    assert result.exit_code == 0 and result.stdout == f"{finished_run / 'report.html'}\n"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drawing_leaves_no_global_figure_and_no_pyplot(finished_run: Path) -> None:
    code = (
        "import sys, pathlib; from trivium.report.html import write_report; "
        "write_report(pathlib.Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(finished_run)], check=True)
