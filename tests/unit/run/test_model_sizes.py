"""A full-precision preset's size is known, and told, before a byte of it is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from expert_profiler.commands import models as command
from expert_profiler.errors import UserError
from expert_profiler.run import model_sizes, models
from expert_profiler.run.machine import GpuMemory
from expert_profiler.run.model_sizes import GIB, SHAPES, MoeShape

QWEN = models.PRESETS["full"].model


@pytest.mark.parametrize(
    ("name", "parameters", "billions"),
    [
        # The last column is what the model's card says.
        ("full", 14_315_784_192, 14.3),
        ("olmoe", 6_919_161_856, 6.9),
        ("granite-3b", 3_298_793_472, 3.3),
        ("granite-1b", 1_334_628_352, 1.3),
    ],
)
def test_presets_have_as_many_parameters_as_their_cards_say(
    name: str, parameters: int, billions: float
) -> None:
    shape = SHAPES[models.PRESETS[name].model]
    assert shape.parameters == parameters
    assert round(parameters / 1e9, 1) == billions


def test_by_hand() -> None:
    # 1 layer: attention 2*4*4 + 2*4*2 = 48, experts 3*3*4*5 = 180, router 12, norms 8: 248.
    assert MoeShape(10, 4, 1, 3, 5, 2, 1, 2).parameters == 2 * 40 + 248 + 4
    assert MoeShape(10, 4, 2, 3, 5, 2, 1, 2, tied=True).parameters == 40 + 2 * 248 + 4


TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "shape"),
    [
        (
            "Qwen2Moe",
            {
                "num_experts": 6,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 24,
                "tie_word_embeddings": False,
            },
            MoeShape(96, 32, 2, 6, 16, 4, 2, 8, qkv_bias=True, shared_expert=24),
        ),
        (
            "Olmoe",
            {"num_experts": 6, "intermediate_size": 16, "tie_word_embeddings": False},
            MoeShape(96, 32, 2, 6, 16, 4, 2, 8, qk_norm=True),
        ),
        (
            "GraniteMoe",
            {"num_local_experts": 6, "intermediate_size": 16, "tie_word_embeddings": True},
            MoeShape(96, 32, 2, 6, 16, 4, 2, 8, tied=True),
        ),
    ],
)
def test_parameters_are_counted_like_transformers_counts_them(
    kind: str, config: dict[str, Any], shape: MoeShape
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    filled = getattr(transformers, f"{kind}Config")(**TINY, **config, pad_token_id=0)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(filled)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_what_fits_16_gib_in_full_precision() -> None:
    fits = {
        name: model_sizes.needed_bytes(SHAPES[preset.model]) <= 16 * GIB
        for name, preset in models.PRESETS.items()
        if preset.model in SHAPES
    }
    assert fits == {"full": False, "olmoe": True, "granite-3b": True, "granite-1b": True}
    # OLMoE is close: not on a 16 GB card that has 15 GiB, such as a T4.
    needed = model_sizes.needed_bytes(SHAPES[models.PRESETS["olmoe"].model]) / GIB
    assert needed == pytest.approx(15.18, abs=0.01)


@pytest.mark.parametrize(
    ("free", "ranks", "missing"),
    [([16], 1, "14.3 GiB too little"), ([24], 1, "6.3 GiB too little"), ([40, 12], 2, "3.7 GiB")],
)
def test_too_little_memory_is_told_with_the_arithmetic(
    free: list[int], ranks: int, missing: str
) -> None:
    devices = [GpuMemory("card", size * GIB, size * GIB) for size in free]
    with pytest.raises(UserError, match=missing) as caught:
        model_sizes.check(QWEN, devices, ranks)
    assert "14.3 B parameters x 2 bytes" in str(caught.value)


@pytest.mark.parametrize(("free", "ranks"), [([40], 1), ([24, 24], 2)])
def test_enough_memory_is_enough(free: list[int], ranks: int) -> None:
    devices = [GpuMemory("card", size * GIB, size * GIB) for size in free]
    model_sizes.check(QWEN, devices, ranks)


def test_without_a_gpu_only_small_models_are_tried() -> None:
    with pytest.raises(UserError, match=r"needs 1 CUDA device\(s\) with 26.7 GiB"):
        model_sizes.check(QWEN, [], 1)
    model_sizes.check(models.PRESETS["granite-3b"].model, [], 1)
    model_sizes.check("someone/some-moe", [], 1)


def test_the_arithmetic_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--gib", "16"]) == 0
    out = capsys.readouterr().out
    assert "experts 402,653,184" in out
    assert "= 6,919,161,856" in out
    assert "x 2 bytes = 13.84 GB = 12.89 GiB" in out
    assert "15.18 GiB: fits 16 GiB, 0.8 left" in out
    assert "30.33 GiB: 14.3 GiB too much" in out
