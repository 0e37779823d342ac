"""What the HTML pages share: the style sheet (light and dark) and the frame of a page."""

from collections.abc import Iterable
from html import escape

CSS = """
:root {
  --paper: #fdfcfa; --card: #ffffff; --ink: #1d2128; --muted: #667080; --grid: #e4e3df;
  --train: #8fa3bf; --held-out: #1f5fae; --floor: #b3541e; --good: #2e7d4f; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181d; --card: #1c2027; --ink: #e6e8ec; --muted: #98a2b1; --grid: #2d333d;
    --train: #5f7796; --held-out: #7db4f5; --floor: #f0a06c; --good: #6fcf97; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 0.9rem; font-size: 1.15rem; letter-spacing: -0.005em; }
p { margin: 0.5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
header p, .note, .absent, small { color: var(--muted); }
.note, small { font-size: 0.85rem; }
.status {
  display: inline-block; margin-left: 0.4rem; padding: 0.1rem 0.6rem; border: 1px solid; border-radius: 1rem;
  font-size: 0.85rem; font-weight: 500; letter-spacing: 0; vertical-align: middle; color: var(--muted);
}
.status.finished { color: var(--good); }
.status.failed { color: var(--bad); }
.status.running { color: var(--held-out); }
.failure { margin-top: 1.5rem; padding: 0.9rem 1.1rem; border-left: 4px solid var(--bad); background: var(--card); }
.failure h2 { margin: 0; color: var(--bad); }
.failure p { white-space: pre-wrap; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 0 2.5rem; margin: 0; }
dl div {
  display: flex; justify-content: space-between; gap: 1rem; padding: 0.42rem 0; border-bottom: 1px solid var(--grid);
}
dt { color: var(--muted); white-space: nowrap; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { color: var(--muted); font-size: 0.85rem; margin-bottom: 0.3rem; }
.wide { overflow-x: auto; }
.wide svg { min-width: 36rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.grid {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem 2.5rem;
  margin-top: 1.5rem;
}
.strip {
  display: grid; grid-auto-flow: column; grid-auto-columns: minmax(14rem, 1fr); gap: 1rem;
  overflow-x: auto; padding-bottom: 0.75rem; margin-bottom: 1rem;
}
.strip figure { padding: 0.8rem 1rem; background: var(--card); border: 1px solid var(--grid); border-radius: 0.5rem; }
blockquote { margin: 0; font-size: 0.93rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { margin: 1.2rem 0 0.6rem; max-width: none; white-space: pre-wrap; }
.prompt small { margin-right: 0.5rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; }
pre {
  margin: 0.5rem 0; padding: 0.9rem 1.1rem; overflow-x: auto; background: var(--card);
  border: 1px solid var(--grid); border-radius: 0.5rem; font: 0.82rem/1.5 ui-monospace, Menlo, Consolas, monospace;
}
"""


def page(title: str, sections: Iterable[str], css: str = "") -> str:
    """A whole page; empty sections are left out. `title` is text, the sections are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} - Trivium</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A list of labels and values, both HTML."""
    return "<dl>\n" + "\n".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in rows) + "\n</dl>\n"
