"""The quickstart: trains small models with every method and compares them, offline, in minutes.

Trains a tokenizer and a model of about a million parameters from scratch on generated stories of known entropy, and
reports the distance to the lowest possible loss. The model is then fine-tuned to answer questions about stories with
LoRA, QLoRA and full fine-tuning. Uses the code of `trivium train` and `trivium compare`.
"""

import re
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path

from trivium.config.load import ResolvedRun, load_run, quote
from trivium.engine.prepare import prepare
from trivium.engine.runfolder import RunFolder
from trivium.errors import ConfigError
from trivium.quickstart.grammar import floor_nats_per_token, write_corpus
from trivium.quickstart.questions import write_questions
from trivium.report.comparison import write_comparison
from trivium.train import train
from trivium.use.compare import Bar, Comparison, Note, compare

NUM_STORIES = 24_000
CORPUS_SEED = 1
NUM_QUESTION_ROWS, QUESTIONS_PER_STORY, NUM_HELD_OUT_QUESTIONS = 3_000, 3, 200
NUM_GENERAL_STORIES = 200
MAX_ANSWER_TOKENS = 16
HELD_OUT_QUESTIONS, OTHER_STORIES = "questions-held-out.jsonl", "stories-held-out.jsonl"
WAYS = ("lora", "qlora", "full")


def train_all(runs_dir: Path, overrides: tuple[str, ...], note: Note) -> list[RunFolder]:
    """Train or resume the quickstart's models: first from scratch, then the fine-tuned ones.

    Args:
        runs_dir: folder of the data and run folders.
        overrides: `key=value` for the first run.
        note: called before each run.
    """
    runs_dir.mkdir(parents=True, exist_ok=True)
    stories, questions = runs_dir / "stories.jsonl", runs_dir / "questions.jsonl"
    write_corpus(stories, NUM_STORIES, CORPUS_SEED)
    resolved = run_of("scratch", runs_dir, (f"data.sources.0.path={quote(str(stories))}", *overrides))
    write_floor(resolved)
    folders = [train(resolved)]
    write_questions(
        questions,
        runs_dir / HELD_OUT_QUESTIONS,
        NUM_QUESTION_ROWS,
        NUM_HELD_OUT_QUESTIONS,
        CORPUS_SEED,
        QUESTIONS_PER_STORY,
    )
    places = {"model.name": folders[0].model, "data.sources.0.path": questions, "data.sources.1.path": stories}
    settings = tuple(f"{key}={quote(str(path))}" for key, path in places.items())
    for way in WAYS:
        if way == "qlora" and find_spec("bitsandbytes") is None:
            note("QLoRA is skipped because bitsandbytes is not installed: pip install 'trivium[gpu]' (CPU works too)")
            continue
        note(f"\nfine-tuning on questions about stories: {way}")
        folders.append(train(run_of(way, runs_dir, settings)))
    return folders


def compare_all(folders: Sequence[RunFolder], runs_dir: Path, note: Note, bar: Bar) -> tuple[Comparison, Path]:
    """Compare the models on unseen questions and stories, and write the report."""
    write_corpus(runs_dir / OTHER_STORIES, NUM_GENERAL_STORIES, "other stories")
    comparison = compare(
        [str(folder.path) for folder in folders],
        prompts=runs_dir / HELD_OUT_QUESTIONS,
        held_out=runs_dir / HELD_OUT_QUESTIONS,
        general=runs_dir / OTHER_STORIES,
        max_new_tokens=MAX_ANSWER_TOKENS,
        note=note,
        bar=bar,
    )
    return comparison, write_comparison(comparison, runs_dir / "quickstart-comparison")


def run_of(way: str, runs_dir: Path, settings: tuple[str, ...]) -> ResolvedRun:
    """Load one of the quickstart's run files."""
    with as_file(files("trivium.quickstart") / f"{way}.yaml") as run_file:
        return load_run(run_file, (f"runs_dir={quote(str(runs_dir))}", *settings))


def train_on_text(text_file: Path, runs_dir: Path, overrides: tuple[str, ...]) -> RunFolder:
    """Train only a model from scratch, on the user's text."""
    if not text_file.is_file():
        raise ConfigError(
            f"{text_file} does not exist. Give the path of a text file, or no path to train on generated stories."
        )
    name = f"quickstart-{re.sub(r'[^A-Za-z0-9._-]+', '-', text_file.stem)}"
    settings = [f"name={name}", f"data.sources.0.path={quote(str(text_file))}"]
    if text_file.suffix in (".txt", ".md"):
        settings.append("data.sources.0.documents=paragraph")
    return train(run_of("scratch", runs_dir, (*settings, *overrides)))


def write_floor(resolved: ResolvedRun) -> None:
    """Write floor.json to the run folder: the grammar's entropy on the held-out stories.

    Not written if `seq_len` splits a story, since the model then lacks its beginning.
    """
    folder = RunFolder(Path(resolved.run.runs_dir) / resolved.run.name)
    if folder.read("floor.json") is not None:
        return
    job = prepare(resolved.run, note=lambda _: None)
    texts, num_tokens = [], []
    for batch in job.held_out:
        for (_, _, start, _), ids in batch.pieces():
            if start > 0:
                return
            texts.append(job.tokenizer.decode(ids, skip_special_tokens=True))
            num_tokens.append(len(ids))
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write(
        "floor.json",
        {
            "nats_per_token": floor_nats_per_token(texts, num_tokens),
            "what": f"the exact entropy of the stories' grammar on the {len(texts)} held-out stories",
        },
    )


def summary(folder: RunFolder) -> str:
    """The results of the first run as text."""
    losses = [record["eval/loss"] for record in folder.metrics if "eval/loss" in record]
    samples = list(folder.samples)
    floor = folder.read("floor.json")
    lines = []
    if samples:
        for when, sample in (("before", samples[0]), ("after", samples[-1])):
            lines.append(f"A sample {when} training (step {sample['step']:,}):\n  {sample['prompt']}{sample['text']}\n")
    if losses:
        lines.append(f"Held-out loss: {losses[0]:.4f} nats per token before training, {losses[-1]:.4f} after.")
    if losses and floor:
        best = floor["nats_per_token"]
        above = losses[-1] / best - 1
        lines.append(f"The lowest possible loss is {best:.4f} ({floor['what']}). The model is {above:.1%} above it.")
    lines.append(f"Model: {folder.model}\nReport: {folder.path / 'report.html'}")
    lines.append(f"Next: trivium chat {folder.path}    trivium verify {folder.path}")
    return "\n".join(lines)
