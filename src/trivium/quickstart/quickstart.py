"""The quickstart: from a clone to a trained model and a report, offline, in minutes.

Writes little stories whose exact entropy is known (or takes the user's own text), trains a tokenizer and a model of
about a million parameters on them through the same path as `trivium train`, and says how far it is from the best
possible. Used by the command line.
"""

import re
from importlib.resources import as_file, files
from pathlib import Path

from trivium.engine.runfolder import RunFolder
from trivium.engine.setup import prepare
from trivium.errors import ConfigError
from trivium.quickstart.grammar import floor_nats_per_token, write_corpus
from trivium.report.watch import train_with_report
from trivium.runfile import ResolvedRun, load_run, quote

NUM_STORIES = 24_000
CORPUS_SEED = 1


def quickstart(text_file: Path | None, runs_dir: Path, overrides: tuple[str, ...]) -> RunFolder:
    """Train the quickstart's model, or go on with it.

    Args:
        text_file: the user's own text instead of the stories.
        runs_dir: where the stories and the run folder are made.
        overrides: `key=value` over the quickstart's run file.

    Returns: the finished run's folder.
    """
    if text_file is not None and not text_file.is_file():
        raise ConfigError(f"There is no file {text_file}. Give a text file, or nothing to train on generated stories.")
    source = text_file or runs_dir / "stories.jsonl"
    name = "quickstart" if text_file is None else f"quickstart-{re.sub(r'[^A-Za-z0-9._-]+', '-', text_file.stem)}"
    settings = [f"name={name}", f"runs_dir={quote(str(runs_dir))}", f"data.sources.0.path={quote(str(source))}"]
    if source.suffix in (".txt", ".md"):
        settings.append("data.sources.0.documents=paragraph")
    with as_file(files("trivium.quickstart") / "run.yaml") as run_file:
        resolved = load_run(run_file, (*settings, *overrides))
    if text_file is not None:
        return train_with_report(resolved)
    runs_dir.mkdir(parents=True, exist_ok=True)
    write_corpus(source, NUM_STORIES, CORPUS_SEED)
    return train_with_report(resolved, before_report=lambda folder: write_floor(resolved, folder))


def write_floor(resolved: ResolvedRun, folder: RunFolder) -> None:
    """Write floor.json: the grammar's entropy on exactly the stories that the evaluation reads.

    There is none when a row is too short for a story: a model that reads half of one cannot know the other half.
    """
    job = prepare(resolved.run, note=lambda _: None)
    texts, num_tokens = [], []
    for batch in job.held_out:
        for (_, _, start, _), ids in batch.pieces():
            if start > 0:
                return
            texts.append(job.tokenizer.decode(ids, skip_special_tokens=True))
            num_tokens.append(len(ids))
    folder.write(
        "floor.json",
        {
            "nats_per_token": floor_nats_per_token(texts, num_tokens),
            "what": f"the exact entropy of the stories' grammar on the {len(texts)} held-out stories",
        },
    )


def summary(folder: RunFolder) -> str:
    """What was learnt, for the end of the terminal."""
    losses = [record["eval/loss"] for record in folder.metrics if "eval/loss" in record]
    samples = list(folder.samples)
    floor = folder.read("floor.json")
    lines = []
    if samples:
        for when, sample in (("before", samples[0]), ("after", samples[-1])):
            lines.append(f"A sample {when} training (step {sample['step']:,}):\n  {sample['prompt']}{sample['text']}\n")
    if losses:
        lines.append(f"Held-out loss: {losses[0]:.4f} nats a token before training, {losses[-1]:.4f} after.")
    if losses and floor:
        best = floor["nats_per_token"]
        above = losses[-1] / best - 1
        lines.append(f"The best possible is {best:.4f}, {floor['what']}: the model is {above:.1%} above it.")
    lines.append(f"Model: {folder.model}\nReport: {folder.path / 'report.html'}")
    lines.append(f"Go on with: trivium chat {folder.path}    trivium verify {folder.path}")
    return "\n".join(lines)
