"""`trivium model`: list model sizes, or find one for a parameter count. Never imports torch."""

import json
from dataclasses import asdict

import click

from trivium.config.inputs import parse_count
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.shape import Family, QwenShape

QWEN_VOCAB_SIZE = 151_936
COLUMNS = ("name", "family", "params", "layers", "hidden", "heads/kv", "head dim", "ffn", "vocab", "tied")


@click.group()
def model() -> None:
    """Model sizes: list the known ones, or find one for a parameter count."""


@model.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_sizes(as_json: bool) -> None:
    """List every size a run file can name, with its exact number of parameters."""
    sizes = {name: catalog.get(name) for name in catalog.names()}
    if as_json:
        click.echo(json.dumps([{"name": name, **_as_dict(shape)} for name, shape in sizes.items()], indent=2))
        return
    rows = [COLUMNS, *(_row(name, shape) for name, shape in sizes.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        name, family, *numbers = row
        cells = [name.ljust(widths[0]), family.ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[2:], strict=True)]
        click.echo("  ".join(cells))


@model.command("size")
@click.option("--params", required=True, help="Total parameters, for example 900K, 25M or 1.5B.")
@click.option("--vocab", required=True, help="Vocabulary size, for example 8192.")
@click.option("--family", type=click.Choice(["qwen2", "qwen3"]), default="qwen3", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def size(params: str, vocab: str, family: Family, as_json: bool) -> None:
    """Find a model shape for a number of parameters, and show the share of its embeddings."""
    num_params, vocab_size = parse_size(params, "--params"), parse_size(vocab, "--vocab")
    shape = catalog.size_for_budget(num_params, vocab_size, family)
    qwen = _with_qwen_vocabulary(num_params, family)
    if as_json:
        at_qwen = _as_dict(qwen) if isinstance(qwen, QwenShape) else {"does_not_fit": qwen}
        found = {"budget": num_params, **_as_dict(shape), "at_qwen_vocabulary": at_qwen}
        click.echo(json.dumps(found, indent=2))
        return
    facts = _facts(shape) | {
        "parameters": f"{shape.num_params:,} ({shape.num_params / num_params - 1:+.1%} of the budget)"
    }
    for label, value in facts.items():
        click.echo(f"{label:<16}{value}")
    click.echo(f"\nThe same budget at Qwen's own vocabulary of {QWEN_VOCAB_SIZE:,} tokens:")
    if isinstance(qwen, str):
        click.echo(qwen)
    else:
        for label, value in _facts(qwen).items():
            click.echo(f"{label:<16}{value}")


def parse_size(text: str, option: str) -> int:
    """A count as run files write it: `25M` is 25,000,000.

    Raises: ConfigError for anything else, and for zero.
    """
    count = parse_count(text.replace(",", "").replace("_", ""))
    if not isinstance(count, int) or count <= 0:
        raise ConfigError(f"{option} is {text!r}; give a count above zero, for example 900K, 25M, 1.5B or 8192.")
    return count


def _with_qwen_vocabulary(num_params: int, family: Family) -> QwenShape | str:
    """The shape for the budget with Qwen's vocabulary, or why there is none."""
    try:
        return catalog.size_for_budget(num_params, QWEN_VOCAB_SIZE, family)
    except ConfigError as error:
        return str(error)


def _facts(shape: QwenShape) -> dict[str, str]:
    """The facts about a shape for the terminal, by label."""
    share = shape.num_embedding_params / shape.num_params
    tied = "shared by input and output" if shape.tie_word_embeddings else "input and output apart"
    return {
        "parameters": f"{shape.num_params:,}",
        "vocabulary": f"{shape.num_embedding_params:,} of them ({share:.1%}) are embeddings, {tied}",
        "layers": f"{shape.num_hidden_layers}",
        "hidden": f"{shape.hidden_size}",
        "heads": f"{shape.num_attention_heads} query, {shape.num_key_value_heads} key-value",
        "head size": f"{shape.head_dim}",
        "feed-forward": f"{shape.intermediate_size}",
    }


def _as_dict(shape: QwenShape) -> dict[str, object]:
    """One shape as JSON: its counts, then its fields by config.json's names."""
    return {
        "num_params": shape.num_params,
        "num_embedding_params": shape.num_embedding_params,
        "embedding_share": round(shape.num_embedding_params / shape.num_params, 4),
        **asdict(shape),
    }


def _row(name: str, shape: QwenShape) -> tuple[str, ...]:
    """The cells of one size, in the order of COLUMNS."""
    return (
        name,
        shape.family,
        f"{shape.num_params:,}",
        f"{shape.num_hidden_layers}",
        f"{shape.hidden_size}",
        f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
        f"{shape.head_dim}",
        f"{shape.intermediate_size}",
        f"{shape.vocab_size:,}",
        "yes" if shape.tie_word_embeddings else "no",
    )
