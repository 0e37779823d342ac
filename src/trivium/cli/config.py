"""`trivium config`: show a run file in full, explain its keys, print the JSON schema. Never imports torch."""

import json
from pathlib import Path

import click

from trivium.config.explain import Key, json_schema, key_at, keys, suggest
from trivium.config.load import ResolvedRun, dump_run, flatten, load_run, to_yaml
from trivium.errors import ConfigError

FILE = click.Path(path_type=Path)


@click.group()
def config() -> None:
    """Show, explain and check run files."""


@config.command()
@click.argument("file", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the run and the origin of each key as JSON.")
def show(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print every value of FILE, defaults included, with its origin.

    \b
    Example:
      trivium config show run.yaml optimizer.lr=1e-3
    """
    resolved = load_run(file, overrides)
    if as_json:
        click.echo(json.dumps({"run": resolved.run.model_dump(), "origins": resolved.origins}, indent=2))
    else:
        click.echo(dump_run(resolved.run, resolved.origins), nl=False)


@config.command()
@click.argument("key", required=False)
@click.option("--file", type=FILE, help="Also show the values of this run file.")
def explain(key: str | None, file: Path | None) -> None:
    """Explain KEY, or list all keys.

    \b
    Example:
      trivium config explain optimizer.lr
    """
    resolved = load_run(file) if file else None
    if key is None:
        for entry in keys().values():
            click.echo(_summary(entry, resolved))
        return
    path = tuple(key.split("."))
    if (entry := key_at(path)) is None:
        raise ConfigError(f"{key} is not a known key; {suggest(path)}")
    click.echo(_explanation(entry, resolved))


@config.command()
def schema() -> None:
    """Print the JSON schema of run files.

    Editors with a YAML language server then complete and check run files:

    \b
      trivium config schema > run.schema.json
      # first line of a run file:
      # yaml-language-server: $schema=run.schema.json
    """
    click.echo(json.dumps(json_schema(), indent=2))


def _present(key: Key, resolved: ResolvedRun | None) -> list[str]:
    """The key's values in a run file with their origins; keys of list entries can have several."""
    if resolved is None:
        return []
    values = flatten(resolved.run)
    mine = [dotted for dotted in values if key_at(tuple(dotted.split("."))) == key]
    return [f"{dotted} is {to_yaml(values[dotted])} ({resolved.origins[dotted]})" for dotted in mine]


def _summary(key: Key, resolved: ResolvedRun | None) -> str:
    """One line of the list of all keys: the name, indented by depth, and its value or meaning."""
    indent, name = "  " * key.dotted.count("."), key.dotted.rsplit(".", 1)[-1]
    meaning = key.doc.partition(". ")[0].rstrip(".")
    return f"{indent + name:<28} {'; '.join(_present(key, resolved)) or meaning}"


def _explanation(key: Key, resolved: ResolvedRun | None) -> str:
    """The full text about one key."""
    lines = [key.dotted, f"  {key.doc}", f"  expects  {key.expected}"]
    lines += [f"  default  {default}" for default in _defaults(key)]
    lines.append(f"  example  {key.dotted.replace('.N', '.0')}={to_yaml(key.example)}")
    lines += [f"  now      {present}" for present in _present(key, resolved)]
    if key.part:
        lines += ["  keys"]
        children = [keys()[f"{key.dotted}.{name}"] for name in key.part.model_fields]
        lines += [f"    {child.dotted.rsplit('.', 1)[-1]:<24} {child.doc}" for child in children]
    return "\n".join(lines)


def _defaults(key: Key) -> list[str]:
    """The default of every method, or one for all."""
    if key.dotted == "name":
        return ["the run file's name"]
    if not key.defaults:
        return ["none; required"]
    by_method = [f"{to_yaml(value)} with method {method}" for method, value in key.defaults.items() if method]
    return by_method or [to_yaml(key.defaults[""])]
