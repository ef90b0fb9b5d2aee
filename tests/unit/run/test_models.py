"""Which model runs, and whether it fits, is known before a byte of it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expert_profiler.errors import UserError
from expert_profiler.resources import DEMO_MODEL
from expert_profiler.run import models


def test_auto_takes_the_quantized_model_with_a_gpu_and_the_demo_model_without() -> None:
    assert models.resolve("auto", has_gpu=True).model == "Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4"
    assert models.resolve("auto", has_gpu=False) is models.PRESETS["demo"]
    tiny = models.resolve("tiny", has_gpu=False)
    assert (tiny.model, tiny.kind) == (str(models.TINY_PATH), "random weights")


def test_the_demo_model_is_known_by_its_folder_too() -> None:
    assert models.resolve(str(DEMO_MODEL), has_gpu=True) is models.PRESETS["demo"]


def test_only_a_checkpoint_of_this_repository_can_be_missing(tmp_path: Path) -> None:
    gone = replace(models.PRESETS["demo"], model=str(tmp_path / "gone"))
    assert gone.missing()
    assert not models.PRESETS["demo"].missing()
    assert not models.resolve("someone/some-moe", has_gpu=False).missing()


def test_any_hub_id_is_taken_as_it_is() -> None:
    preset = models.resolve("someone/some-moe", has_gpu=False)
    assert (preset.model, preset.dtype, preset.kind) == ("someone/some-moe", "auto", "pretrained")
    assert models.read_config("someone/some-moe") is None


def test_a_language_model_inside_a_multimodal_config_counts() -> None:
    config = {"text_config": {"num_hidden_layers": 4, "num_local_experts": 8}}
    models.check_config("m", config, "0-3")
    with pytest.raises(UserError, match="layer 4 is not in m"):
        models.check_config("m", config, "4")
