# SPDX-License-Identifier: Apache-2.0
"""Which model a run uses, and whether it can be profiled at all: checked before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_profiler.errors import IN_CHECKOUT, UserError
from expert_profiler.resources import CACHE, DEMO_MODEL

TINY_PATH = CACHE / "tiny-moe"

#: Names of "experts a layer has" and "experts a token takes" in Hugging Face configs.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Preset:
    """A model with settings that are known to fit.

    Attributes:
        model: hub id or path.
        dtype: vLLM's ``--dtype``.
        max_model_len: tokens; None takes the model's own, up to 2,048.
        kind: "pretrained", "small demo model" or "random weights".
        remade_by: what brings a checkpoint of this project where it is missing: a command.
    """

    model: str
    dtype: str
    max_model_len: int | None
    kind: str
    remade_by: str | None = None

    def missing(self) -> bool:
        """Whether this is a checkpoint of this project and not there."""
        return self.remade_by is not None and not (Path(self.model) / "config.json").is_file()


PRESETS = {
    "gptq": Preset("Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4", "float16", 512, "pretrained"),
    "full": Preset("Qwen/Qwen1.5-MoE-A2.7B-Chat", "bfloat16", 512, "pretrained"),
    "olmoe": Preset("allenai/OLMoE-1B-7B-0924", "bfloat16", 512, "pretrained"),
    "granite-3b": Preset(
        "ibm-granite/granite-3.0-3b-a800m-instruct", "bfloat16", 512, "pretrained"
    ),
    "granite-1b": Preset(
        "ibm-granite/granite-3.0-1b-a400m-instruct", "bfloat16", 512, "pretrained"
    ),
    "demo": Preset(
        str(DEMO_MODEL),
        "bfloat16",
        1024,
        "small demo model",
        # 7 MB, so not in the wheel.
        f"git checkout -- {DEMO_MODEL}" if IN_CHECKOUT else "expert-profiler profile --model tiny",
    ),
    "tiny": Preset(
        str(TINY_PATH),
        "bfloat16",
        1024,
        "random weights",
        "expert-profiler profile --model tiny",
    ),
}


def resolve(name: str, has_gpu: bool) -> Preset:
    """The model behind ``--model``: "auto", a preset's name, a hub id or a path.

    Args:
        name: as given.
        has_gpu: whether "auto" may take the model that needs one.
    """
    if name == "auto":
        name = "gptq" if has_gpu else "demo"
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).resolve() == DEMO_MODEL:
        return PRESETS["demo"]
    return Preset(name, "auto", None, "random weights" if is_tiny(Path(name)) else "pretrained")


def is_tiny(path: Path) -> bool:
    """Whether a checkpoint is one of ``tiny_model``."""
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return "random weights" in text.lower()


def read_config(model: str) -> Mapping[str, Any] | None:
    """The model's ``config.json``; None for a hub id, which only the hub can answer for.

    Raises:
        UserError: a local path without a usable config.
    """
    path = Path(model)
    if not path.exists():
        looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
        if looks_local:
            raise UserError(
                f"model {model} does not exist; give a checkpoint's folder or a hub id, "
                "or run with --model tiny"
            )
        return None
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} has no config.json, so it is no checkpoint; "
            "give --model a Hugging Face checkpoint folder"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; check: ls -l {file}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({error}); download the checkpoint again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object; download the checkpoint again")
    return config


def check_config(model: str, config: Mapping[str, Any], layers: str) -> None:
    """Refuse a dense model, and layers that the model does not have.

    Args:
        model: for the message.
        config: its ``config.json``.
        layers: the layer selection, "all", "0" or "0,3-5".
    """
    text = config.get("text_config") or config
    depth = text.get("num_hidden_layers") if isinstance(text, dict) else None
    longest = config.get("max_position_embeddings")
    for key, value in (("num_hidden_layers", depth), ("max_position_embeddings", longest)):
        if value is not None and not (type(value) is int and 0 < value < 1 << 62):
            raise UserError(
                f"the config.json of {model} has no number of {key}; download the checkpoint again"
            )
    if not isinstance(text, dict):
        raise UserError(
            f"text_config in the config.json of {model} is no object; download the checkpoint again"
        )
    if not any(text.get(key) for key in EXPERT_KEYS):
        raise UserError(
            f"{model} is a dense model (its config.json names no experts); "
            "choose a Mixture-of-Experts model with --model"
        )
    beyond = [] if depth is None else [n for n in numbers(layers) if n >= depth]
    if depth is not None and beyond:
        raise UserError(
            f"layer {beyond[0]} is not in {model}, which has layers 0 to {depth - 1}; "
            "choose others with --layers"
        )


def numbers(layers: str) -> list[int]:
    """The layer numbers that a selection names, ends of ranges included.

    Raises:
        UserError: it is neither "all" nor a list such as "0,3-5".
    """
    if layers == "all":
        return []
    try:
        found = [[int(end) for end in item.split("-")] for item in layers.split(",")]
    except ValueError:
        found = []
    if not found or any(len(ends) > 2 or ends != sorted(ends) for ends in found):
        raise UserError(f"--layers {layers!r} is no selection of layers; use all, 0 or 0,3-5")
    return [n for ends in found for n in ends]
