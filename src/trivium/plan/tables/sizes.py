"""What the guides say of parameters: of models, adapters, tables of words, and the small shapes; each counted again.

Counts come from `model.shape` and `plan.workload`, which the tests hold to transformers and PEFT. Imported inside
`plan.tables`; never imports torch.
"""

from trivium.config.run import Adapter
from trivium.model import catalog
from trivium.plan.tables.claim import Claim, point
from trivium.plan.workload import Workload, num_adapter_params

QWEN_VOCABULARY = 151_936
# Guide A, "The vocabulary wall": hidden size, parameters untied and tied.
WALL = (
    (4096, 1.24e9, 622e6),
    (1024, 311e6, 156e6),
    (512, 156e6, 78e6),
    (128, 39e6, 19.5e6),
    (32, 9.7e6, 4.9e6),
    (4, 1.2e6, 608e3),
)
# Guide A, "Practical configurations at each scale": its name, what it says, the same shape in the catalogue.
SMALL = (
    ("config_1b", (1e9, 1e9), "ladder-582m"),
    ("config_100m", (100e6, 100e6), "ladder-116m"),
    ("config_10m", (10e6, 10e6), "ladder-21m"),
    ("config_1m", (1e6, 1e6), "ladder-0.5m"),
    ("config_tiny", (4e3, 50e3), "ladder-7k"),
)
TRADE_OFFS = "How the three paradigms compare"


def qwen7b() -> "catalog.QwenShape":
    """The model that both guides reckon with."""
    return catalog.get("Qwen2.5-7B")


def parameter_claims() -> list[Claim]:
    """Of Qwen2.5-7B and adapters on it."""
    shape, rank64, rank16 = qwen7b(), Adapter(rank=64), Adapter(rank=16)
    params, adapter = shape.num_params, num_adapter_params(shape, rank64)
    layers, per_rank = shape.num_hidden_layers, num_adapter_params(shape, Adapter(rank=1)) // shape.num_hidden_layers
    least = num_adapter_params(shape, rank16)
    head = shape.vocab_size * shape.hidden_size
    body = params - shape.num_embedding_params
    return [
        Claim(
            "A",
            "Full fine-tuning",
            "Qwen2.5-7B",
            "parameters",
            point(7.6e9),
            point(params),
            f"{body:,} in the layers + 2 x {shape.vocab_size:,} x {shape.hidden_size:,} = {params:,}",
        ),
        Claim(
            "A",
            TRADE_OFFS,
            "Qwen2.5-7B, frozen under LoRA",
            "parameters",
            point(7.4e9),
            point(params),
            f"the same {params:,}; the adapter comes on top",
        ),
        Claim(
            "A",
            TRADE_OFFS,
            "LoRA r=64 on all 7 projections",
            "parameters",
            point(160e6),
            point(adapter),
            f"{layers} layers x 64 x {per_rank:,} (inputs + outputs of the seven) = {adapter:,}",
        ),
        Claim(
            "A",
            TRADE_OFFS,
            "the same, of the model",
            "share",
            point(0.02),
            point(adapter / params),
            f"{adapter:,} / {params:,}",
        ),
        Claim(
            "A",
            TRADE_OFFS,
            "the formula 2 x r x (in + out) x layers x projections, for r=64",
            "parameters",
            point(2 * adapter),
            point(adapter),
            "A is r x in and B is out x r: r x (in + out), without the 2",
        ),
        Claim(
            "A",
            "the heading",
            "trained by LoRA, r=16 to 64",
            "share",
            (0.005, 0.02),
            (least / params, adapter / params),
            f"{least:,} to {adapter:,} of {params:,}",
        ),
        Claim(
            "A",
            "What breaks at small scale",
            "the head's share of 7B",
            "share",
            point(0.02),
            point(head / params),
            f"{shape.vocab_size:,} x {shape.hidden_size:,} = {head:,} of {params:,}",
        ),
        Claim(
            "A",
            "What breaks at small scale",
            "an untied head's share of a small model",
            "share",
            (0.6, 1.0),
            (0.0, 0.5),
            "an untied head has as many parameters as the embedding, so that it is less than half",
        ),
        Claim(
            "A",
            "The vocabulary wall",
            "dense sizes of Qwen2.5 and Qwen3 whose head is untied",
            "share",
            point(1.0),
            point(_untied_share()),
            "0.5B, 1.5B and 3B of Qwen2.5, 0.6B, 1.7B and 4B of Qwen3 are tied",
        ),
        _small_adapter_claim(),
    ]


def _untied_share() -> float:
    shapes = [catalog.get(name) for name in (*catalog.QWEN25, *catalog.QWEN3)]
    return sum(not shape.tie_word_embeddings for shape in shapes) / len(shapes)


def _small_adapter_claim() -> Claim:
    """Guide B: at r=16 an adapter is under 1 % of its base, for the four sizes of its table."""
    shares = {}
    for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"):
        shape = catalog.get(name)
        shares[name] = num_adapter_params(shape, Adapter(rank=16)) / shape.num_params
    each = ", ".join(f"{name.removeprefix('Qwen2.5-')} {share:.2%}" for name, share in shares.items())
    largest = max(shares.values())
    return Claim(
        "B",
        "LoRA memory",
        "an adapter of r=16, at most, of its base",
        "share",
        (0.0, 0.01),
        point(largest),
        f"on all seven projections: {each}",
    )


def vocabulary_claims() -> list[Claim]:
    """What the embedding table and the head cost at each width."""
    claims = []
    for hidden, untied, tied in WALL:
        one = QWEN_VOCABULARY * hidden
        product = f"{QWEN_VOCABULARY:,} x {hidden:,}"
        claims += [
            Claim(
                "A",
                "The vocabulary wall",
                f"hidden size {hidden:,}, untied",
                "parameters",
                point(untied),
                point(2 * one),
                f"2 x {product} = {2 * one:,}",
            ),
            Claim(
                "A",
                "The vocabulary wall",
                f"hidden size {hidden:,}, tied",
                "parameters",
                point(tied),
                point(one),
                f"{product} = {one:,}",
            ),
        ]
    return claims


def small_claims() -> list[Claim]:
    """The guide's five small configurations under their real sizes."""
    claims = []
    for name, said, ours in SMALL:
        shape = catalog.get(ours)
        share = shape.num_embedding_params / shape.num_params
        claims.append(
            Claim(
                "A",
                "Practical configurations at each scale",
                name,
                "parameters",
                said,
                point(shape.num_params),
                f"{shape.num_params:,}, of which {share:.0%} embeddings; here it is called {ours}",
            )
        )
    return claims


def frozen_share(workload: Workload) -> float:
    """Bytes of what stays frozen, over those of the same weights in 16 bits."""
    return workload.frozen_bytes / (2 * workload.shape.num_params)
