# SPDX-License-Identifier: Apache-2.0
"""Which layers a model has, and which are recorded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.layers import MoELayer, describe, layer_index, parse_selection, select

from tests.support.build import QUICK, a_layer

#: By model file: a name with {} for the index, and the first indices that have experts.
NAMES = {
    "afmoe": ("model.layers.{}.mlp.experts", (2, 3)),
    "bailing_moe": ("model.layers.{}.mlp.experts", (1, 2)),
    "dbrx": ("transformer.blocks.{}.ffn.experts", (0, 1)),
    "deepseek_v2": ("model.layers.{}.mlp.experts", (1, 2)),
    "deepseek_v3": ("model.layers.{}.mlp.experts", (3, 4, 60)),
    "deepseek_vl2": ("language.model.layers.{}.mlp.experts", (1, 2)),
    "ernie45_moe": ("model.layers.{}.mlp.experts", (1, 2)),
    "glm4_moe": ("model.layers.{}.mlp.experts", (1, 2, 45)),
    "gpt_oss": ("model.layers.{}.mlp.experts", (0, 1)),
    "granitemoe": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "grok1": ("model.layers.{}.moe_block.experts", (0, 1)),
    "jamba": ("model.layers.{}.feed_forward.experts", (1, 3, 5)),
    "kimi_linear": ("model.layers.{}.block_sparse_moe.experts", (1, 2)),
    "lfm2_moe": ("model.layers.{}.feed_forward.experts", (2, 3)),
    "llama4": ("language_model.model.layers.{}.feed_forward.experts", (1, 3)),
    "minimax_m2": ("model.layers.{}.mlp.experts", (0, 1)),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "nemotron_h": ("model.layers.{}.mixer.experts", (1, 3, 6)),
    "olmoe": ("model.layers.{}.mlp.experts", (0, 1)),
    "phimoe": ("model.layers.{}.block_sparse_moe.experts", (0, 1)),
    "qwen2_moe": ("model.layers.{}.mlp.experts", (0, 1, 23)),
    "qwen3_moe": ("model.layers.{}.mlp.experts", (0, 1, 93)),
    "qwen3_next": ("model.layers.{}.mlp.experts", (0, 1)),
    "qwen3_vl_moe": ("language_model.model.layers.{}.mlp.experts", (0, 1)),
    "step3_text": ("model.layers.{}.moe.experts", (4, 5)),
}


def _module(**changes: object) -> SimpleNamespace:
    facts = {
        "top_k": 4,
        "logical_num_experts": 60,
        "renormalize": False,
        "scoring_func": "softmax",
        "custom_routing_function": None,
    }
    return SimpleNamespace(**{**facts, **changes})


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.mlp.experts", 0),
        ("model.layers.23.mlp.experts", 23),
        ("language_model.model.layers.7.block_sparse_moe.experts", 7),
        ("transformer.h.11.ffn.experts", 11),
        ("11.experts", 11),
        ("model.layers.5", 5),
        ("model.layers2d.3.w13.experts", 3),
    ],
)
def test_the_layer_index_is_the_number_in_the_name(name: str, index: int) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    "name", ["model.mlp.experts", "", "model.layer3.experts", "model.layers.3.block.1.experts"]
)
def test_a_name_without_one_clear_number_is_refused(name: str) -> None:
    with pytest.raises(RouteLogError, match="unset VLLM_LOG_MOE") as caught:
        layer_index(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.3.1.experts", "0.1"])
def test_a_name_with_two_neighbouring_numbers_is_refused(name: str) -> None:
    with pytest.raises(RouteLogError, match="2 numbers"):
        layer_index(name)


def test_a_model_with_its_own_routing_function_is_not_called_softmax() -> None:
    named = [("model.layers.0.mlp.experts", _module(custom_routing_function=min))]
    assert describe(named)[0].scoring_func == "custom"


def test_layers_are_listed_by_index_with_what_the_module_says() -> None:
    named = [
        ("model.layers.10.mlp.experts", _module(renormalize=True, scoring_func="sigmoid")),
        ("model.layers.2.mlp.experts", _module(top_k=2, logical_num_experts=8)),
    ]
    assert describe(named) == [
        MoELayer(2, "model.layers.2.mlp.experts", 2, 8, "router", False, "softmax"),
        MoELayer(10, "model.layers.10.mlp.experts", 4, 60, "router", True, "sigmoid"),
    ]


def test_dense_layers_leave_gaps() -> None:
    named = [(f"model.layers.{i}.mlp.experts", _module()) for i in (1, 3, 26)]
    assert [item.layer for item in describe(named)] == [1, 3, 26]


def test_a_model_without_experts_has_no_layers() -> None:
    assert describe([]) == []


def test_two_layers_with_one_index_are_refused_by_name() -> None:
    named = [
        ("model.layers.1.mlp.experts", _module()),
        ("model.layers.2.mlp.experts", _module()),
        ("mtp.layers.1.mlp.experts", _module()),
    ]
    with pytest.raises(RouteLogError, match="share layer index 1") as caught:
        describe(named)
    assert "'model.layers.1.mlp.experts' and 'mtp.layers.1.mlp.experts'" in str(caught.value)


def test_a_layer_describes_itself_as_the_header_shows_it() -> None:
    assert list(a_layer(0)._asdict()) == [
        "layer",
        "name",
        "top_k",
        "num_experts",
        "source",
        "renormalize",
        "scoring_func",
    ]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", None),
        (" all ", None),
        ("0", {0}),
        ("0,3-5", {0, 3, 4, 5}),
        (" 7 , 2 - 3 ", {2, 3, 7}),
        ("4-4", {4}),
        ("1,1,0-2", {0, 1, 2}),
    ],
)
def test_a_selection_is_all_or_indices_and_ranges(text: str, chosen: set[int] | None) -> None:
    assert parse_selection(text) == chosen


@pytest.mark.parametrize(
    "text", ["", " ", ",", "0,", "a", "ALL", "-1", "1-", "5-3", "0-99999999", "1.5", "0;1", "all,0"]
)
def test_any_other_selection_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(RouteLogError, match="VLLM_LOG_MOE_LAYERS=") as caught:
        parse_selection(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


_RANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 50), st.booleans()), min_size=1, max_size=8
)


@QUICK
@given(_RANGES, st.sampled_from(["", " ", "\t"]))
def test_a_selection_means_the_union_of_its_items(
    items: list[tuple[int, int, bool]], space: str
) -> None:
    texts, meant = [], set()
    for first, length, single in items:
        last = first if single else first + length
        texts.append(f"{first}" if single else f"{first}{space}-{space}{last}")
        meant |= set(range(first, last + 1))
    assert parse_selection(f"{space},{space}".join(texts)) == meant


@QUICK
@given(st.text(alphabet="0123456789-,. al\n", max_size=8))
def test_a_selection_is_understood_or_refused_but_never_crashes(text: str) -> None:
    try:
        chosen = parse_selection(text)
    except RouteLogError:
        return
    assert chosen is None or (chosen and min(chosen) >= 0)


@QUICK
@given(st.lists(st.integers(0, 30), unique=True, min_size=1), st.data())
def test_selected_layers_keep_the_models_order(present: list[int], data: st.DataObject) -> None:
    layers = [a_layer(index) for index in sorted(present)]
    wanted = data.draw(st.lists(st.sampled_from(present), min_size=1))
    assert [item.layer for item in select(",".join(map(str, wanted)), layers)] == sorted(
        set(wanted)
    )
    assert select("all", layers) == layers


def test_an_unknown_layer_is_named_together_with_the_known_ones() -> None:
    layers = [a_layer(index) for index in (1, 3, 5)]
    with pytest.raises(RouteLogError) as caught:
        select("3-4", layers)
    assert str(caught.value) == (
        "VLLM_LOG_MOE_LAYERS='3-4': layer 4 is no MoE layer of this model; its MoE layers are 1,3,5"
    )


# ---- the names that vLLM 0.15.1 gives to layers with experts --------------------------------


@pytest.mark.parametrize("model", NAMES)
def test_a_models_own_names_give_its_layer_indices(model: str) -> None:
    name, indices = NAMES[model]
    # In an order that is not theirs: vLLM lists them as they are made, rank by rank.
    found = describe([(name.format(i), _module()) for i in reversed(indices)])
    assert [(item.layer, item.name) for item in found] == [(i, name.format(i)) for i in indices]


def test_a_layer_with_two_sets_of_experts_is_refused() -> None:
    """ernie45_vl: each sees a masked subset of the tokens."""
    names = [f"language_model.model.layers.1.mlp.{kind}_experts" for kind in ("text", "vision")]
    with pytest.raises(RouteLogError, match="share layer index 1"):
        describe([(name, _module()) for name in names])
