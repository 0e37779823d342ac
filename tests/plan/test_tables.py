"""The guides' figures computed again: counts held to transformers and PEFT, sums to their own lines of arithmetic."""

import json
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from trivium.cli.plan import plan
from trivium.model import catalog
from trivium.plan import devices
from trivium.plan.tables import Table, needs, sizes, tables
from trivium.plan.tables.claim import GUIDES, Claim
from trivium.plan.tables.show import as_json, as_markdown, as_text

# As the guide has them, under "Practical configurations at each scale".
GUIDE_CONFIGS = {
    "config_1b": (1024, 24, 16, 4, 2816, 151936, False),
    "config_100m": (512, 12, 8, 8, 1365, 151936, True),
    "config_10m": (128, 6, 4, 4, 341, 151936, True),
    "config_1m": (64, 4, 2, 2, 170, 4096, True),
    "config_tiny": (16, 2, 2, 2, 42, 64, True),
}
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
positive = st.floats(1e-3, 1e15)


@pytest.fixture(scope="module")
def found() -> list[Table]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVIUM_HOME", "/dev/null")
        return tables()


@pytest.fixture(scope="module")
def claims(found) -> list[Claim]:
    return [claim for table in found for claim in table.claims]


def meta_model(name: str) -> Qwen2ForCausalLM:
    """The published model without its values, as transformers builds it."""
    config = catalog.get(name).to_hf_config()
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**{key: value for key, value in config.items() if key != "architectures"}))


def num_params(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def pick(claims: list[Claim], what: str, place: str = "") -> Claim:
    (claim,) = [claim for claim in claims if claim.what == what and claim.place.startswith(place)]
    return claim


@pytest.mark.parametrize("size", needs.FULL)
def test_sums_of_memory_stand_on_counts_of_transformers_and_peft(claims, size):
    model = meta_model(needs.MODELS[size])
    params = num_params(model)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=ALL_TARGETS, task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert pick(claims, f"{size}: weights, gradients, Adam").found == (12 * params, 12 * params)
    assert pick(claims, f"{size}: base, frozen").found == (2 * params, 2 * params)
    assert pick(claims, f"{size}: adapter, gradients, Adam").found == (16 * trained, 16 * trained)


def test_the_adapter_of_rank_64_is_pefts(claims):
    model = meta_model("Qwen2.5-7B")
    params = num_params(model)
    adapted = get_peft_model(model, LoraConfig(r=64, target_modules=ALL_TARGETS, task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert pick(claims, "Qwen2.5-7B").found == (params, params)
    assert pick(claims, "LoRA r=64 on all 7 projections").found == (trained, trained)
    assert pick(claims, "the same, of the model").found == pytest.approx((trained / params, trained / params))
    head = model.get_output_embeddings().weight.numel()
    assert pick(claims, "the head's share of 7B").found == pytest.approx((head / params, head / params))


@pytest.mark.parametrize("name", GUIDE_CONFIGS)
def test_small_configurations_have_the_counts_that_transformers_gives_them(claims, name):
    hidden, layers, heads, key_value_heads, wide, vocab, tied = GUIDE_CONFIGS[name]
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=wide,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    assert pick(claims, name).found == (num_params(model), num_params(model))


@pytest.mark.parametrize("hidden", [row[0] for row in sizes.WALL])
def test_the_vocabulary_costs_what_torch_allocates(claims, hidden):
    table = torch.nn.Embedding(151_936, hidden, device="meta").weight.numel()
    assert pick(claims, f"hidden size {hidden:,}, tied").found == (table, table)
    assert pick(claims, f"hidden size {hidden:,}, untied").found == (2 * table, 2 * table)


def test_lines_of_arithmetic_come_to_what_is_found(claims):
    """Of those that are numbers and signs, such as `2 x 151,936 x 4 = 1,215,488`, once words between are left out."""
    evaluated = 0
    for claim in claims:
        text = re.sub(r"\([a-z +]+\)|[a-z]{2,}|,| B$", "", claim.arithmetic)
        sides = text.split("=")
        if not all(re.fullmatch(r" *[\d.]+( *[x+/] *[\d.(]+\)?)* *", side) for side in sides):
            continue
        ends = [eval(side.replace("x", "*"), {"__builtins__": {}}) for side in sides]
        for end in ends:
            assert not isinstance(claim.found, bool) and claim.found[0] == pytest.approx(end), claim
        evaluated += 1
    assert evaluated > 25


def test_what_cannot_be_is_not_said_to_be(claims):
    params, flops = num_params(meta_model("Qwen2.5-7B")), devices.catalog()["a100-80"].flops["bf16"]
    assert 16 * params > 80e9
    assert [claim.found for claim in claims if claim.what == "full of 7B on A100 80"] == [False, False]
    hours_at_peak = 6 * 6.5e9 * 1e12 / (8 * flops) / 3600
    taken = pick(claims, "1T tokens, 7B, 8 x A100 80")
    assert not isinstance(taken.found, bool) and taken.found[0] > hours_at_peak and taken.verdict == "wrong"


def test_larger_devices_fit_with_gentler_settings(found):
    (table,) = [table for table in found if table.title == "What fits"]
    order = [*needs.SETTINGS, "no"]
    for _, *cells in table.rows:
        ranks = [order.index(cell.partition(" ")[2] or cell) for cell in cells[1:]]  # a T4 computes in fp32
        assert ranks == sorted(ranks, reverse=True)


@given(positive, positive, positive, st.floats(1.3, 100.0))
def test_a_verdict_is_about_the_distance(low, width, found, times):
    def judged(*ours: float) -> Claim:
        return Claim("A", "", "", "times", (low, low + width), ours, "")  # type: ignore[arg-type]

    assert judged(low, low + width).verdict == judged(low / times, low).verdict == "right"
    assert judged((low + width) * times, (low + width) * times).verdict == "wrong"
    assert judged(low / times, low / times).verdict == "wrong"
    outside = max(found / (low + width), low / found) - 1
    assert judged(found, found).gap == pytest.approx(max(0.0, outside))


def test_every_claim_is_whole_and_shown(found, claims):
    text, page = as_text(found), as_markdown(found)
    for claim in claims:
        assert claim.guide in GUIDES and claim.place and claim.arithmetic
        assert claim.what in text and f"| {claim.what} |" in page
        if not isinstance(claim.found, bool):
            assert claim.found[0] <= claim.found[1]
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_verb_prints_the_tables_and_their_values(found, monkeypatch):
    monkeypatch.setenv("TRIVIUM_HOME", "/dev/null")
    result = CliRunner().invoke(plan, ["--table"])
    assert result.exit_code == 0 and result.output.rstrip() == as_text(found)
    result = CliRunner().invoke(plan, ["--table", "--json"])
    assert json.loads(result.output) == json.loads(json.dumps(as_json(found), allow_nan=False))


def test_the_tables_need_no_torch():
    code = "import sys; from trivium.plan.tables import tables; tables(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
