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
    added(
        "key one level too high",
        "lr: 1",
        ":4: lr is not",
        "did you mean optimizer.lr?",
    ),
    added("key one level too deep", "optimizer:\n  seed: 1", ":5: optimizer.seed is not", "did you mean seed?"),
    added("nothing near", "zzz: 1", ":4: zzz is not a known key; a run has method, name, model"),
    added("nothing near in a part", "log:\n  zzz: 1", ":5: log.zzz is not a known key; log has every_steps"),
    added("capitals", "Seed: 1", ":4: Seed is not a known key", "did you mean seed?"),
    added("dash for underscore", "loss-tokens: all", ":4: loss-tokens is not a known key", "mean loss_tokens?"),
    added("space in a key", "runs dir: x", ":4: runs dir is not", "mean runs_dir?"),
    added("number as a key", "7: x", ":4: 7 is not a known key"),
    added("null as a key", "~: x", ":4: ~ is not a known key"),
    added("empty key", '"": x', ":4:  is not a known key"),
    added("merge key", "<<: {seed: 1}", ":4: << is not a known key"),
    added("private name", "__class__: x", ":4: __class__ is not a known key"),
    added("dotted key", "optimizer.beta1: 0.9", ":4: optimizer.beta1 is not a known key"),
    added("huge key", "k" * 900 + ": x", ":4: kkk", "is not a known key"),
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
        ':5: optimizer.lr is the text "fast"',
        "a number above 0",
    ),
    added(
        "quoted number",
        'optimizer:\n  lr: "1e-4"',
        ':5: optimizer.lr is the text "1e-4"',
        "remove the quotes",
    ),
    added(
        "comma for a point", "optimizer:\n  beta1: 0,9", ':5: optimizer.beta1 is the text "0,9"', "expected a number"
    ),
    added("a list for a number", "seed: [1]", ":4: seed is a list of 1; expected a whole number at least 0"),
    added("a mapping for a number", "seed: {a: 1}", ":4: seed is a mapping (a)", "expected a whole number"),
    added("a number with a point", "seed: 1.5", ":4: seed is 1.5; expected a whole number"),
    added("true for a number", "seed: true", ":4: seed is true", "expected a whole number"),
    case(
        "true for a share",
        "method: scratch\nmodel: 1M\ndata: {sources: [a], held_out: true}\n",
        "data.held_out is true",
    ),
    case(
        "a source as the data",
        "method: scratch\nmodel: 1M\ndata: {path: a}\n",
        ":3: data.path is not a known key",
        "data.sources.N.path",
    ),
    added("empty value", "seed:", ":4: seed is empty; expected a whole number"),
    added("sexagesimal is text", "seed: 1:30", ':4: seed is the text "1:30"'),
    added("date is text", "seed: 2026-01-01", ':4: seed is the text "2026-01-01"'),
    added("underscores are text", "seed: 1_000", ':4: seed is the text "1_000"'),
    added("octal of YAML 1.1 is decimal", "seed: 99999999999", ":4: seed is 99999999999", "below 4,294,967,296"),
    added("no is text", "optimizer:\n  beta1: no", ':5: optimizer.beta1 is the text "no"'),
    added("off is text", "seed: off", ':4: seed is the text "off"'),
    added("number for text", "name: 123", ":4: name is 123;", "letters, digits"),
    added("number for a folder", "runs_dir: 5", ":4: runs_dir is 5; expected text; put quotes around it"),
    added("bool for text", "device: true", ":4: device is true", "put quotes around it"),
    added("list for text", "device: [cpu]", ":4: device is a list of 1; expected text"),
    added("text for a part", "schedule: cosine", ':4: schedule is the text "cosine"; expected the keys kind'),
    added("empty part", "schedule:", ":4: schedule is empty; expected the keys kind, warmup_ratio"),
    added("list for a part", "log: [1]", ":4: log is a list of 1; expected the keys every_steps"),
    added("number for a tokenizer", "tokenizer: 5", ":4: tokenizer is 5; expected text or the keys path, train"),
    added("text for a list", "sample:\n  prompts: hello", ':5: sample.prompts is the text "hello"; expected a list'),
    added(
        "number in a list of texts",
        "sample:\n  prompts: [a, 5]",
        ":5: sample.prompts.1 is 5; expected text; put quotes",
    ),
    added("null in a list of texts", "sample:\n  prompts:\n  - a\n  -", ":7: sample.prompts.1 is empty; expected text"),
    added(
        "text for a bool",
        "tokenizer: {train: {kind: bpe, vocab_size: big}}",
        ':4: tokenizer.train.vocab_size is the text "big"',
    ),
    case(
        "number for a model",
        "method: scratch\nmodel: 5\ndata: a\n",
        ":2: model is 5; expected text or the keys name, params",
    ),
    case(
        "number for the data",
        "method: scratch\nmodel: 1M\ndata: 5\n",
        ":3: data is 5; expected a file, a list of sources",
    ),
    case(
        "number for a source",
        "method: scratch\nmodel: 1M\ndata: [a, 5]\n",
        ":3: data.sources.1 is 5; expected a file or the keys",
    ),
    case(
        "yes for a flag",
        "method: scratch\nmodel:\n  shape: {hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, "
        "num_attention_heads: 1, tie_word_embeddings: yes}\ndata: a\n",
        ':3: model.shape.tie_word_embeddings is the text "yes"; expected true or false',
    ),
]

OUT_OF_RANGE = [
    added(
        "negative rate",
        "optimizer:\n  lr: -1e-4",
        ":5: optimizer.lr is -0.0001",
        "above 0 and below 1",
    ),
    added("rate of zero", "optimizer:\n  lr: 0", ":5: optimizer.lr is 0; expected a number above 0"),
    added("rate over one", "optimizer:\n  lr: 3", ":5: optimizer.lr is 3;", "below 1"),
    added("nan", "optimizer:\n  lr: .nan", ":5: optimizer.lr is nan"),
    added("infinity", "optimizer:\n  max_grad_norm: .inf", ":5: optimizer.max_grad_norm is inf"),
    added("minus infinity", "optimizer:\n  max_grad_norm: -.INF", ":5: optimizer.max_grad_norm is -inf"),
    added("float that overflows", "optimizer:\n  max_grad_norm: 1e999", ":5: optimizer.max_grad_norm is inf"),
    added("no steps", "budget: {steps: 0}", ":4: budget.steps is 0; expected a whole number above 0"),
    added("negative steps", "budget: {steps: -5}", ":4: budget.steps is -5"),
    added("half a step", "budget: {steps: 1.5}", ":4: budget.steps is 1.5"),
    added("infinitely many steps", "budget: {steps: .inf}", ":4: budget.steps is inf"),
    added("unknown suffix", "budget: {tokens: 5X}", ':4: budget.tokens is the text "5X"', "a count such as 25M"),
    added("negative count", "budget: {tokens: -5M}", ':4: budget.tokens is the text "-5M"'),
    added("share over one", "schedule: {warmup_ratio: 1.1}", ":4: schedule.warmup_ratio is 1.1", "at most 1"),
    added("percent", "schedule: {warmup_ratio: 5%}", ':4: schedule.warmup_ratio is the text "5%"'),
    added("hot", "sample: {temperature: 11}", ":4: sample.temperature is 11", "at most 10"),
    added("negative seed", "seed: -1", ":4: seed is -1; expected a whole number at least 0"),
    added("keep nothing", "checkpoint: {keep: 0}", ":4: checkpoint.keep is 0; expected a whole number above 0"),
    added("number of 5000 digits", "seed: " + "9" * 5000, ":4: found a number of over 100 digits"),
    added("count of 500 digits", "budget: {tokens: '" + "9" * 500 + "T'}", ":4: found a number of over 100 digits"),
    case(
        "short rows",
        "method: scratch\nmodel: 1M\ndata: {sources: [a], seq_len: 4}\n",
        ":3: data.seq_len is 4",
        "at least 8",
    ),
    case(
        "all held out",
        "method: scratch\nmodel: 1M\ndata: {sources: [a], held_out: 1}\n",
        ":3: data.held_out is 1",
        "below 1",
    ),
    case(
        "too many workers",
        "method: scratch\nmodel: 1M\ndata: {sources: [a], workers: 9999}\n",
        "data.workers is 9999",
        "at most 512",
    ),
    case(
        "weightless",
        "method: scratch\nmodel: 1M\ndata: [{path: a, weight: 0}]\n",
        ":3: data.sources.0.weight is 0",
        "above 0",
    ),
    case(
        "no sources",
        "method: scratch\nmodel: 1M\ndata: []\n",
        ":3: data.sources is a list of 0; expected a list of at least one",
    ),
    case("empty sources", "method: scratch\nmodel: 1M\ndata:\n  sources: []\n", ":4: data.sources is a list of 0"),
]

WRONG_CHOICES = [
    case(
        "method",
        "method: scrach\nmodel: 1M\ndata: a\n",
        ':1: method is the text "scrach"; expected one of lora',
        "mean scratch?",
    ),
    case(
        "method in capitals",
        "method: LoRA\nmodel: 1M\ndata: a\n",
        ':1: method is the text "LoRA"; expected one of lora, qlora',
    ),
    case(
        "method as a list", "method: [scratch]\nmodel: 1M\ndata: a\n", ":1: method is a list of 1; expected one of lora"
    ),
    case("method as a number", "method: 1\nmodel: 1M\ndata: a\n", ":1: method is 1; expected one of lora"),
    case("method null", "method:\nmodel: 1M\ndata: a\n", ":1: method is empty; expected one of lora"),
    added(
        "schedule",
        "schedule: {kind: cosin}",
        ":4: schedule.kind",
        "one of cosine, linear, wsd, constant; did you mean cosine?",
    ),
    added("precision", "precision: fp16", ':4: precision is the text "fp16"; expected one of auto, fp32, bf16'),
    added("precision as a number", "precision: 32", ":4: precision is 32; expected one of auto"),
    added("weights", "weights: randm", ":4: weights", "did you mean random?"),
    added("trainable", "trainable: all", ':4: trainable is the text "all"; expected one of adapter, everything'),
    added("loss tokens", "loss_tokens: everything", ":4: loss_tokens", "expected one of assistant, all"),
    added("tokenizer kind", "tokenizer: {train: {kind: bep}}", ":4: tokenizer.train.kind", "did you mean bpe?"),
    added(
        "path traversal in the name",
        "name: ../../etc",
        ':4: name is the text "../../etc"; expected at most 100 letters',
    ),
    added("absolute name", "name: /tmp/x", ":4: name is the text"),
    added("hidden name", "name: .x", ":4: name is the text"),
    added("empty name", 'name: ""', ':4: name is the text ""'),
    added("long name", "name: " + "n" * 101, ":4: name is the text", "at most 100"),
    added("name with a line break", 'name: "a\\nb"', ":4: name is the text", "\\U0000000a"),
    case(
        "documents",
        "method: scratch\nmodel: 1M\ndata:\n  sources:\n  - path: a\n    documents: lines\n",
        ":6: data.sources.0.documents",
        "did you mean line?",
    ),
]

MISSING = [
    case("empty file", "", "run.yaml: method is missing; expected one of lora", "model is missing", "data is missing"),
    case("only a comment", "# nothing\n", "run.yaml: method is missing"),
    case("null", "null\n", "run.yaml: method is missing"),
    case("no model", "method: scratch\ndata: a\n", "run.yaml: model is missing; expected text or the keys"),
    case("no data", "method: scratch\nmodel: 1M\n", "run.yaml: data is missing; expected a file"),
    case(
        "sources absent",
        "method: scratch\nmodel: 1M\ndata: {seq_len: 8}\n",
        ":3: data.sources is missing; expected a list",
    ),
    case("half a shape", "method: scratch\nmodel: {shape: {}}\ndata: a\n", ":2: model.shape.hidden_size is missing"),
]

COMBINATIONS = [
    case(
        "two models",
        "method: scratch\nmodel: {name: x, params: 1M}\ndata: a\n",
        ":2: model: found name and params; set exactly one",
    ),
    case(
        "no model named",
        "method: scratch\nmodel: {}\ndata: a\n",
        ":2: model: found none of them; set exactly one of name, params",
    ),
    added("two tokenizers", "tokenizer: {path: a, train: {}}", ":4: tokenizer: found path and train; set exactly one"),
    added("no tokenizer", "tokenizer: {}", ":4: tokenizer: found none of them"),
    added("two budgets", "budget: {steps: 5, tokens: 5}", ":4: budget: found steps and tokens; set exactly one"),
    added("no budget", "budget: {}", ":4: budget: found none of them"),
    added(
        "batch not in rows", "batch:\n  tokens: 1000", ":5: batch.tokens 1000 is not a multiple of data.seq_len 1024"
    ),
    shaped("heads without equal shares", 48, 6, "num_key_value_heads: 4", "4 does not divide num_attention_heads 6"),
    shaped("an odd head", 64, 4, "head_dim: 15", "head_dim 15 is odd"),
    shaped(
        "no whole head", 50, 4, "family: qwen3", "hidden_size 50 / num_attention_heads 4 is no even width of a head"
    ),
    added("an empty prompt", "sample: {prompts: ['']}", ":4: sample.prompts.0"),
    case(
        "a table smaller than the tokenizer",
        "method: scratch\nmodel: {params: 1M, vocab_size: 256}\ntokenizer: {train: {vocab_size: 300}}\ndata: a\n",
        "model.vocab_size 256 is less than tokenizer.train.vocab_size 300",
    ),
    added("micro batch not in rows", "batch:\n  micro_tokens: 1000", ":5: batch.micro_tokens 1000 must be a multiple"),
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
    case("lora on a budget", "method: lora\nmodel: 1M\ndata: a\n", "run.yaml: weights: pretrained needs model.name"),
    case(
        "two places",
        "method: scratch\nmodel: 1M\ndata: [{path: a, hub: b}]\n",
        ":3: data.sources.0: found path and hub",
    ),
    case("nowhere", "method: scratch\nmodel: 1M\ndata:\n- weight: 1\n", ":4: data.sources.0: found none of them"),
    case(
        "some weights",
        "method: scratch\nmodel: 1M\ndata:\n- a\n- {path: b, weight: 1}\n",
        ":3: data: some sources have a weight",
    ),
]

BROKEN_YAML = [
    added("duplicate key", "seed: 1\nseed: 2", "run.yaml:5: seed is set twice, here and on line 4; keep one"),
    added(
        "duplicate in a part",
        "log:\n  every_steps: 1\n  every_steps: 1",
        ":6: every_steps is set twice, here and on line 5",
    ),
    added("duplicate in a flow mapping", "log: {every_steps: 1, every_steps: 2}", ":4: every_steps is set twice"),
    added("duplicate under quotes", 'seed: 1\n"seed": 2', ":5: seed is set twice"),
    added("anchor", "name: &x abc", ":4: found an anchor or alias"),
    added("alias", "name: *x", ":4: found an anchor or alias"),
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
    added("line break in a key", '"a\\nb": 1', ":4: a\\U0000000ab is not a known key"),
    added("own tag", "name: !env HOME", ":4: found the tag !env"),
    added("standard tag", "seed: !!int 5", ":4: found the tag tag:yaml.org,2002:int"),
    added("binary", "name: !!binary aGk=", ":4: found the tag"),
    added("tagged key", "!!str seed: 5", ":4: found a key that is not plain text"),
    added("second document", "---\nmethod: lora", ":4: a second document begins here"),
    added("document that ends", "...\nmethod: lora", ":5: not valid YAML"),
    added("tab", "log:\n\tevery_steps: 5", ":5: the line is indented with a tab"),
    added("spaces and a tab", "log:\n  \tevery_steps: 5", ":5:"),
    added("no colon", "seed", "not valid YAML", "missing colon"),
    added("two colons", "name: a: b", ":4: not valid YAML"),
    added("open quote", 'name: "abc', "not valid YAML"),
    added("open bracket", "sample: {prompts: [a", "not valid YAML"),
    added("stray bracket", "name: ]", ":4: not valid YAML"),
    added("wrong indentation", "log:\n    every_steps: 5\n  x: 1", ":6: not valid YAML"),
    added("at sign", "name: @abc", ":4: not valid YAML"),
    added("backtick", "name: `abc`", ":4: not valid YAML"),
    added("bad escape", 'name: "\\q"', ":4: not valid YAML"),
    added("NUL", "name: a\0b", ":4: found the character U+0000"),
    added("escape character", "name: a\x1bb", ":4: found the character U+001B"),
    added("list as a key", "? [a]\n: 1", ":4: found a key that is not plain text"),
    added("mapping as a key", "{a: 1}: 1", ":4: found a key that is not plain text"),
    case("a list", "- a\n- b\n", "run.yaml: found a list of 2; expected keys such as `method: scratch`"),
    case("a word", "scratch\n", 'run.yaml: found the text "scratch"; expected keys'),
    case("a number", "5\n", "run.yaml: found 5; expected keys"),
    case("not UTF-8", GOOD.encode() + b"name: \xff\xfe\n", "run.yaml:4: not UTF-8 text"),
    case("UTF-16", GOOD.encode("utf-16"), "run.yaml:1: not UTF-8 text"),
    case("binary file", bytes(range(256)), "run.yaml:"),
    case("over a mebibyte", "# " + "x" * (1 << 20), "run.yaml: the file is over 1,048,576 bytes"),
    case("ten mebibytes", "a" * (10 << 20), "run.yaml: the file is over 1,048,576 bytes"),
    case("very deep", "[" * 5000, ":1: nested deeper than 20 levels"),
    case("deep mappings", "a: " + "{a: " * 300, ":1: nested deeper than 20 levels"),
    case("very many values", "data: [" + "1," * 200_000 + "]", ":1: over 10,000 values"),
    case(
        "very many unknown keys",
        "".join(f"key{i}: 1\n" for i in range(9000)),
        "key0 is not a known key",
        "more problems",
    ),
    added("control text in a value", 'schedule: {kind: "a\\x07b"}', "\\U00000007"),
]

OVERRIDES = [
    given("seed", 'command line: found the text "seed"; expected key=value'),
    given("seed=-1", "command line: seed is -1; expected a whole number"),
    given("seed=", "command line: seed is empty; expected a whole number"),
    given("seed=x=y", 'command line: seed is the text "x=y"'),
    given("=5", "command line:  is not a known key"),
    given("optimizr.beta1=0.5", "command line: optimizr is not a known key; did you mean optimizer?"),
    given("optimizer.beta_1=0.5", "command line: optimizer.beta_1 is not a known key; did you mean beta1?"),
    given("optimizer..beta1=0.5", "command line: optimizer. is not a known key"),
    given("lr=1", "command line: lr is not a known key"),
    given("optimizer.lr=fast", 'command line: optimizer.lr is the text "fast"'),
    given("optimizer=5", "command line: optimizer is 5; expected the keys lr"),
    given("optimizer={beta1: 2}", "command line: optimizer.beta1 is 2;"),
    given("optimizer={beta1: 0.5, beta1: 0.6}", "command line: optimizer", "beta1 is set twice"),
    given("optimizer={beta1: 0.5", "command line: optimizer", "not valid YAML"),
    given("sample.prompts=[a, *b]", "command line: sample.prompts", "found an anchor or alias"),
    given("sample.prompts=[!!python/name:os.system x]", "command line: sample.prompts", "found the tag"),
    given(
        "data.sources.5=b.txt",
        "command line: data.sources.5: data.sources is a list; expected an entry's number, 0 to 1",
    ),
    given("data.sources.x=b.txt", "command line: data.sources.x: data.sources is a list"),
    given("data.sources.0.wait=1", "command line: data.sources.0.wait is not a known key; did you mean weight?"),
    given("data.sources.weight=1", "command line: data.sources.weight: data.sources is a list"),
    given("method.x=1", 'command line: method.x cannot be set: method is the text "scratch" (run.yaml:1)'),
    given("method=scrtch", "command line: method is", "did you mean scratch?"),
    given("model.name=Qwen/Qwen3-0.6B", ":2: model: found name and params"),
    given("model=null", "command line: model is empty"),
    given("batch.tokens=1000", "command line: batch.tokens 1000 is not a multiple of data.seq_len 1024"),
    given("data.seq_len=1000", "command line: batch.tokens 32768 is not a multiple of data.seq_len 1000"),
    given("seed=" + "9" * 400, "command line: seed", "over 100 digits"),
    given("seed='" + "9" * 400 + "'", "command line: seed", "over 100 digits"),
    given("data.sources.weight.x=1", "command line: data.sources.weight: data.sources is a list"),
    given("nam\udcffe=x", "command line: nam\\U0000dcffe is not valid UTF-8 text"),
    given("a" + ".a" * 5000 + "=1", "is not a known key; no key has over 20 parts"),
    given("\x1b[31mseed=1", "command line: \\U0000001b[31mseed is not a known key"),
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
