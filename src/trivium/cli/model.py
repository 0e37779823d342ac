"""`trivium model`: list model sizes, or find one for a parameter count. Never imports torch."""

import json
from dataclasses import asdict
from typing import get_args

import click

from trivium.config.inputs import parse_count
from trivium.errors import ConfigError
from trivium.model import catalog
from trivium.model.shape import Family, QwenShape

QWEN_VOCAB_SIZE = 151_936


@click.group()
def model() -> None:
    """List the known model sizes, or find one for a parameter count."""


@model.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the sizes as JSON.")
def list_sizes(as_json: bool) -> None:
    """List all sizes with their exact parameter counts."""
    sizes = {name: catalog.get(name) for name in catalog.names()}
    if as_json:
        click.echo(json.dumps([{"name": name, **_as_dict(shape)} for name, shape in sizes.items()], indent=2))
        return
    rows = [_cells(name, shape) for name, shape in sizes.items()]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    for row in ({column: column for column in widths}, *rows):
        cells = [cell.rjust(widths[column]) for column, cell in row.items()]
        cells[:2] = row["name"].ljust(widths["name"]), row["family"].ljust(widths["family"])
        click.echo("  ".join(cells))


@model.command("size")
@click.option("--params", required=True, help="Total number of parameters, for example 900K, 25M or 1.5B.")
@click.option("--vocab", required=True, help="Vocabulary size, for example 8192.")
@click.option("--family", type=click.Choice(get_args(Family)), default="qwen3", show_default=True, help="Model family.")
@click.option("--json", "as_json", is_flag=True, help="Print the shape as JSON.")
def size(params: str, vocab: str, family: Family, as_json: bool) -> None:
    """Find the model shape for a parameter count."""
    num_params, vocab_size = parse_size(params, "--params"), parse_size(vocab, "--vocab")
    shape = catalog.size_for_budget(num_params, vocab_size, family)
    try:
        at_qwen, too_large = catalog.size_for_budget(num_params, QWEN_VOCAB_SIZE, family), ""
    except ConfigError as error:
        at_qwen, too_large = None, str(error)
    if as_json:
        qwen = _as_dict(at_qwen) if at_qwen else {"does_not_fit": too_large}
        click.echo(json.dumps({"budget": num_params, **_as_dict(shape), "at_qwen_vocabulary": qwen}, indent=2))
        return
    click.echo(f"{_facts(shape)}\n\nThe same parameter count with Qwen's vocabulary of {QWEN_VOCAB_SIZE:,} tokens:")
    click.echo(_facts(at_qwen) if at_qwen else too_large)


def parse_size(text: str, option: str) -> int:
    """A count with an optional suffix: `25M` is 25,000,000.

    Raises: ConfigError for zero and for anything else.
    """
    count = parse_count(text.replace(",", "").replace("_", ""))
    if not isinstance(count, int) or count <= 0:
        raise ConfigError(f"{option} is {text!r}; expected a count above zero, for example 900K, 25M, 1.5B or 8192.")
    return count


def _facts(shape: QwenShape) -> str:
    """The facts about a shape, one per line."""
    share = shape.num_embedding_params / shape.num_params
    tied = "shared by input and output" if shape.tie_word_embeddings else "separate for input and output"
    facts = {
        "parameters": f"{shape.num_params:,}",
        "embeddings": f"{shape.num_embedding_params:,} of them ({share:.1%}), {tied}",
        "layers": shape.num_hidden_layers,
        "hidden size": shape.hidden_size,
        "heads": f"{shape.num_attention_heads} query, {shape.num_key_value_heads} key-value",
        "head size": shape.head_dim,
        "feed-forward": shape.intermediate_size,
    }
    return "\n".join(f"{label:<16}{value}" for label, value in facts.items())


def _as_dict(shape: QwenShape) -> dict[str, object]:
    """One shape as JSON: counts of parameters, then the fields of config.json."""
    return {
        "num_params": shape.num_params,
        "num_embedding_params": shape.num_embedding_params,
        "embedding_share": round(shape.num_embedding_params / shape.num_params, 4),
        **asdict(shape),
    }


def _cells(name: str, shape: QwenShape) -> dict[str, str]:
    """The cells of a row of the table, by column."""
    return {
        "name": name,
        "family": shape.family,
        "params": f"{shape.num_params:,}",
        "layers": f"{shape.num_hidden_layers}",
        "hidden": f"{shape.hidden_size}",
        "heads/kv": f"{shape.num_attention_heads}/{shape.num_key_value_heads}",
        "head dim": f"{shape.head_dim}",
        "ffn": f"{shape.intermediate_size}",
        "vocab": f"{shape.vocab_size:,}",
        "tied": "yes" if shape.tie_word_embeddings else "no",
    }
