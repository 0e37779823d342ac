"""The catalog: names, parameter counts, and the search for a budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import ConfigError
from trivium.model import catalog, resolve
from trivium.model.shape import FAMILIES, Family

PUBLISHED_VARIANTS = {
    "Qwen2.5-14B": {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    "Qwen2.5-14B-Instruct": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "Qwen2.5-0.5B": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "Qwen2.5-7B": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "Qwen3-0.6B": {"rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
    "SmolLM2-360M": {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 100_000.0},
    "SmolLM2-1.7B-Instruct": {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 130_000.0},
    "Qwen3-0.6B-Base": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
}


def log_uniform(least: int, most: int) -> st.SearchStrategy[int]:
    return st.floats(math.log(least), math.log(most)).map(lambda x: min(most, max(least, round(math.exp(x)))))


def test_catalog_has_every_published_model() -> None:
    published = catalog.hub_ids()
    assert len(published) == 7 * 2 + 6 * 2 - 1 + 3 * 2
    assert "Qwen3-32B-Base" not in published
    assert published["Qwen3-8B"] == "Qwen/Qwen3-8B"
    assert published["SmolLM2-135M-Instruct"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("smollm2-360m", "HuggingFaceTB/SmolLM2-360M"),
        ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    ],
)
def test_published_models_are_found_by_name_and_by_hub_id(name: str, hub_id: str) -> None:
    assert resolve.hub_id(name) == hub_id
    assert resolve.published_shape(name) == catalog.get(hub_id.rpartition("/")[2])


@pytest.mark.parametrize("name", ["HuggingFaceTB/Qwen3-0.6B", "Qwen/SmolLM2-360M", "Qwen/ladder-1m", "owner/model"])
def test_names_of_other_owners_are_not_published_models(name: str) -> None:
    assert resolve.hub_id(name) == name
    assert resolve.published_shape(name) is None


@pytest.mark.parametrize(("name", "constants"), PUBLISHED_VARIANTS.items())
def test_catalog_base_and_chat_models_differ_in_constants(name: str, constants: dict[str, float]) -> None:
    shape = catalog.get(name)
    assert {field: getattr(shape, field) for field in constants} == constants


def test_get_ignores_case_and_suggests_near_names() -> None:
    assert catalog.get("qwen3-0.6b-base") is catalog.get("Qwen3-0.6B-Base")
    with pytest.raises(ConfigError, match=r"'Qwen3-0\.6B'"):
        catalog.get("Qwen3-0.6")
    with pytest.raises(ConfigError, match="nearest"):
        catalog.get("")


def test_ladder_names_match_parameter_counts() -> None:
    counts = {name: catalog.get(name).num_params for name in catalog.LADDER}
    assert counts == {
        "ladder-7k": 7_280,
        "ladder-0.5m": 459_584,
        "ladder-1m": 1_017_216,
        "ladder-21m": 20_630_656,
        "ladder-116m": 115_565_056,
        "ladder-582m": 581_784_576,
    }


@given(log_uniform(50_000, 10_000_000_000), log_uniform(256, 151_936), st.sampled_from(list(FAMILIES)))
def test_size_for_budget_gives_a_well_shaped_model_or_a_reason(budget: int, vocab_size: int, family: Family) -> None:
    try:
        shape = catalog.size_for_budget(budget, vocab_size, family)
    except ConfigError as error:
        assert vocab_size * 64 > budget, "only a dominating vocabulary may fail"
        assert f"{vocab_size:,} x " in str(error)
        return
    assert abs(shape.num_params / budget - 1) <= 0.05
    assert (shape.family, shape.vocab_size) == (family, vocab_size)
    assert shape.hidden_size % (64 if shape.hidden_size >= 256 else 16) == 0
    assert shape.intermediate_size % (64 if shape.hidden_size >= 256 else 32) == 0
    assert shape.head_dim in (32, 64, 128)
    assert shape.num_attention_heads * shape.head_dim >= shape.hidden_size
    assert 3 <= shape.hidden_size / shape.num_hidden_layers <= 512
    if shape.hidden_size >= 128:
        assert 2 <= shape.intermediate_size / shape.hidden_size <= 4
    untied = 2 * shape.vocab_size * shape.hidden_size
    assert shape.tie_word_embeddings == (untied > budget / 4)


def test_size_for_budget_refuses_a_vocabulary_larger_than_the_budget() -> None:
    with pytest.raises(ConfigError, match="151,936 x 16 = 2,430,976.*budget is 1,000,000"):
        catalog.size_for_budget(1_000_000, 151_936)
    with pytest.raises(ConfigError, match="Expected both above zero"):
        catalog.size_for_budget(0, 256)
