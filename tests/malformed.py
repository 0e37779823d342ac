"""Wrong run files and overrides, and what the message on each must say; for the tests and `bench/startup.py`."""

from dataclasses import dataclass

GOOD = "method: scratch\nmodel: 1M\ndata: a.txt\n"


@dataclass(frozen=True)
class Case:
    """A run file's content, overrides, and fragments that must all be in the message."""

    name: str
    content: str | bytes
    fragments: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def case(name: str, content: str | bytes, *fragments: str, overrides: tuple[str, ...] = ()) -> Case:
    return Case(name, content, fragments, overrides)


def shaped(name: str, hidden_size: int, heads: int, more: str, *fragments: str) -> Case:
    """A run file with a model's numbers."""
    numbers = f"hidden_size: {hidden_size}, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: {heads}"
    return Case(name, f"method: scratch\nmodel:\n  shape: {{{numbers}, {more}}}\ndata: a\n", fragments)


def added(name: str, lines: str, *fragments: str) -> Case:
    """A good file with lines added; the first of them is line 4."""
    return Case(name, GOOD + lines + "\n", fragments)


def given(override: str, *fragments: str) -> Case:
    """A good file and one wrong override."""
    return Case(override[:40], GOOD, fragments, (override,))


UNKNOWN_KEYS = [
    added("typo of a part", "optimiser: {}", "run.yaml:4: optimiser is not a known key; did you mean optimizer?"),
    added(
        "typo in a part",
        "optimizer:\n  lerning_rate: 1",
        ":5: optimizer.lerning_rate is not",
        "did you mean optimizer.lr?",
    ),
    added("typo in a flow mapping", "schedule: {knd: wsd}", ":4: schedule.knd is not a known key", "mean kind?"),
    added("key one level too deep", "optimizer:\n  seed: 1", ":5: optimizer.seed is not", "did you mean seed?"),
    added("nothing near", "zzz: 1", ":4: zzz is not a known key; a run has method, name, model"),
    added("nothing near in a part", "log:\n  zzz: 1", ":5: log.zzz is not a known key; log has every_steps"),
    added("dash for underscore", "loss-tokens: all", ":4: loss-tokens is not a known key", "mean loss_tokens?"),
    added("number as a key", "7: x", ":4: 7 is not a known key"),
    added("merge key", "<<: {seed: 1}", ":4: << is not a known key"),
    case(
        "typo in a source",
        "method: scratch\nmodel: 1M\ndata:\n- a.txt\n- path: b.txt\n  wieght: 2\n",
        ":6: data.sources.1.wieght is not a known key; did you mean weight?",
    ),
    case(
        "typo in a shape",
        "method: scratch\nmodel:\n  shape:\n    hiden_size: 64\ndata: a.txt\n",
        ":4: model.shape.hiden_size is not a known key; did you mean hidden_size?",
        ":3: model.shape.hidden_size is missing; expected a whole number above 0",
        ":3: model.shape.num_hidden_layers is missing",
    ),
]

WRONG_TYPES = [
    added(
        "text for a number",
        "optimizer:\n  lr: fast",
        ':5: optimizer.lr is "fast"',
        "a number above 0",
    ),
    added(
        "quoted number",
        'optimizer:\n  lr: "1e-4"',
        ':5: optimizer.lr is "1e-4"',
        "remove the quotes",
    ),
    added("a list for a number", "seed: [1]", ":4: seed is a list of 1; expected a whole number at least 0"),
    added("a mapping for a number", "seed: {a: 1}", ":4: seed is a mapping (a)", "expected a whole number"),
    added("a number with a point", "seed: 1.5", ":4: seed is 1.5; expected a whole number"),
    added("true for a number", "seed: true", ":4: seed is true", "expected a whole number"),
    case(
        "a source as the data",
        "method: scratch\nmodel: 1M\ndata: {path: a}\n",
        ":3: data.path is not a known key",
        "data.sources.N.path",
    ),
    added("empty value", "seed:", ":4: seed is empty; expected a whole number"),
    added("sexagesimal is text", "seed: 1:30", ':4: seed is "1:30"'),
    added("no is text", "optimizer:\n  beta1: no", ':5: optimizer.beta1 is "no"'),
    added("number for text", "name: 123", ":4: name is 123;", "letters, digits"),
    added("number for a folder", "runs_dir: 5", ":4: runs_dir is 5; expected text; put quotes around it"),
    added("text for a part", "schedule: cosine", ':4: schedule is "cosine"; expected any of the keys kind'),
    added("number for a tokenizer", "tokenizer: 5", ":4: tokenizer is 5; expected text or any of the keys path, train"),
    added("text for a list", "sample:\n  prompts: hello", ':5: sample.prompts is "hello"; expected a list'),
    added(
        "number in a list of texts",
        "sample:\n  prompts: [a, 5]",
        ":5: sample.prompts.1 is 5; expected text; put quotes",
    ),
    case(
        "number for the data",
        "method: scratch\nmodel: 1M\ndata: 5\n",
        ":3: data is 5; expected a file, a list of sources",
    ),
    case(
        "yes for a flag",
        "method: scratch\nmodel:\n  shape: {hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, "
        "num_attention_heads: 1, tie_word_embeddings: yes}\ndata: a\n",
        ':3: model.shape.tie_word_embeddings is "yes"; expected true or false',
    ),
]

OUT_OF_RANGE = [
    added(
        "negative rate",
        "optimizer:\n  lr: -1e-4",
        ":5: optimizer.lr is -0.0001",
        "above 0 and below 1",
    ),
    added("nan", "optimizer:\n  lr: .nan", ":5: optimizer.lr is nan"),
    added("float that overflows", "optimizer:\n  max_grad_norm: 1e999", ":5: optimizer.max_grad_norm is inf"),
    added("no steps", "budget: {steps: 0}", ":4: budget.steps is 0; expected a whole number above 0"),
    added("unknown suffix", "budget: {tokens: 5X}", ':4: budget.tokens is "5X"', "a count like 25M"),
    added("share over one", "schedule: {warmup_ratio: 1.1}", ":4: schedule.warmup_ratio is 1.1", "at most 1"),
    added("negative seed", "seed: -1", ":4: seed is -1; expected a whole number at least 0"),
    case(
        "short rows",
        "method: scratch\nmodel: 1M\ndata: {sources: [a], seq_len: 4}\n",
        ":3: data.seq_len is 4",
        "at least 8",
    ),
    case(
        "no sources",
        "method: scratch\nmodel: 1M\ndata: []\n",
        ":3: data.sources is a list of 0; expected a list of at least one entry",
    ),
]

WRONG_CHOICES = [
    case(
        "method",
        "method: scrach\nmodel: 1M\ndata: a\n",
        ':1: method is "scrach"; expected one of lora',
        "mean scratch?",
    ),
    case("method null", "method:\nmodel: 1M\ndata: a\n", ":1: method is empty; expected one of lora"),
    added(
        "schedule",
        "schedule: {kind: cosin}",
        ":4: schedule.kind",
        "one of cosine, linear, wsd, constant; did you mean cosine?",
    ),
    added("precision", "precision: fp16", ':4: precision is "fp16"; expected one of auto, fp32, bf16'),
    added(
        "path traversal in the name",
        "name: ../../etc",
        ':4: name is "../../etc"; expected at most 100 letters',
    ),
    added("name with a line break", 'name: "a\\nb"', ":4: name is", "\\U0000000a"),
]

MISSING = [
    case("empty file", "", "run.yaml: method is missing; expected one of lora", "model is missing", "data is missing"),
    case("no model", "method: scratch\ndata: a\n", "run.yaml: model is missing; expected text or any of the keys"),
    case(
        "sources absent",
        "method: scratch\nmodel: 1M\ndata: {seq_len: 8}\n",
        ":3: data.sources is missing; expected a list",
    ),
]

COMBINATIONS = [
    case(
        "two models",
        "method: scratch\nmodel: {name: x, params: 1M}\ndata: a\n",
        ":2: model: found name and params; set exactly one",
    ),
    added("no tokenizer", "tokenizer: {}", ":4: tokenizer: found none of them"),
    added("two budgets", "budget: {steps: 5, tokens: 5}", ":4: budget: found steps and tokens; set exactly one"),
    added(
        "batch not in rows", "batch:\n  tokens: 1000", ":5: batch.tokens 1000 is not a multiple of data.seq_len 1024"
    ),
    shaped("heads without equal shares", 48, 6, "num_key_value_heads: 4", "4 does not divide num_attention_heads 6"),
    shaped("an odd head", 64, 4, "head_dim: 15", "head_dim 15 is odd"),
    shaped("no whole head", 50, 4, "family: qwen3", "hidden_size 50 / num_attention_heads 4 is not an even head width"),
    case(
        "a table smaller than the tokenizer",
        "method: scratch\nmodel: {params: 1M, vocab_size: 256}\ntokenizer: {train: {vocab_size: 300}}\ndata: a\n",
        "model.vocab_size 256 is less than tokenizer.train.vocab_size 300",
    ),
    added(
        "micro batch does not divide",
        "batch:\n  micro_tokens: 3072",
        ":5: batch.micro_tokens 3072",
        "divide batch.tokens 32768",
    ),
    added(
        "phases over the run",
        "schedule: {kind: wsd, warmup_ratio: 0.9}",
        ":4: schedule: warmup_ratio + decay_ratio is over 1",
    ),
    added("pretrained without a name", "weights: pretrained", ":4: weights: pretrained needs model.name"),
    case(
        "some weights",
        "method: scratch\nmodel: 1M\ndata:\n- a\n- {path: b, weight: 1}\n",
        ":3: data: some sources have a weight",
    ),
]

BROKEN_YAML = [
    added("duplicate key", "seed: 1\nseed: 2", "run.yaml:5: seed is set twice, here and on line 4; keep one"),
    added("duplicate in a flow mapping", "log: {every_steps: 1, every_steps: 2}", ":4: every_steps is set twice"),
    added("anchor", "name: &x abc", ":4: found an anchor or alias"),
    case(
        "billion laughs",
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n",
        ":1: found an anchor or alias",
    ),
    added(
        "python object",
        "name: !!python/object/apply:os.system [ls]",
        ":4: found the tag tag:yaml.org,2002:python/object",
    ),
    added("second document", "---\nmethod: lora", ":4: a second document starts here"),
    added("tab", "log:\n\tevery_steps: 5", ":5: the line is indented with a tab"),
    added("no colon", "seed", "not valid YAML", "missing colon"),
    added("open quote", 'name: "abc', "not valid YAML"),
    added("wrong indentation", "log:\n    every_steps: 5\n  x: 1", ":6: not valid YAML"),
    added("NUL", "name: a\0b", "run.yaml: not valid YAML"),
    added("list as a key", "? [a]\n: 1", ":4: found a key that is not plain text"),
    case("a list", "- a\n- b\n", "run.yaml: found a list of 2; expected keys, for example `method: scratch`"),
    case("not UTF-8", GOOD.encode() + b"name: \xff\xfe\n", "run.yaml:4: not UTF-8 text"),
    case("over a mebibyte", "# " + "x" * (1 << 20), "run.yaml: the file is over 1,048,576 bytes"),
    case(
        "very many unknown keys",
        "".join(f"key{i}: 1\n" for i in range(9000)),
        "key0 is not a known key",
        "more problems",
    ),
]

OVERRIDES = [
    given("seed", 'command line: found "seed"; expected key=value'),
    given("seed=", "command line: seed is empty; expected a whole number"),
    given("optimizr.beta1=0.5", "command line: optimizr is not a known key; did you mean optimizer?"),
    given("optimizer={beta1: 2}", "command line: optimizer.beta1 is 2;"),
    given("optimizer={beta1: 0.5", "command line: optimizer", "not valid YAML"),
    given("sample.prompts=[a, *b]", "command line: sample.prompts", "found an anchor or alias"),
    given(
        "data.sources.5=b.txt",
        "command line: data.sources.5: data.sources is a list; expected an index from 0 to 1",
    ),
    given("data.sources.weight=1", "command line: data.sources.weight: data.sources is a list"),
    given("method.x=1", 'command line: method.x cannot be set: method is "scratch" (run.yaml:1)'),
    given("model.name=Qwen/Qwen3-0.6B", ":2: model: found name and params"),
    given("name=\udcff", "command line: name is not valid UTF-8 text"),
    case("two overrides", GOOD, "seed is -1", "log.every_steps is 0", overrides=("seed=-1", "log.every_steps=0")),
]

CASES = [
    *UNKNOWN_KEYS,
    *WRONG_TYPES,
    *OUT_OF_RANGE,
    *WRONG_CHOICES,
    *MISSING,
    *COMBINATIONS,
    *BROKEN_YAML,
    *OVERRIDES,
]
