# SPDX-License-Identifier: Apache-2.0
"""The folder of a profiling run: what may go there, and how it gets there together."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_profiler import files
from expert_profiler.artifacts import NAMES
from expert_profiler.errors import UserError

ROUTES, OUTPUTS, TIMING, PROMPTS = (
    NAMES[kind] for kind in ("routes", "outputs", "timing", "prompts")
)
#: The modes of a timed pass: armed but not recording, and recording.
MODES = ("no_log", "log")


def prepare(out: Path, mode: str, force: bool) -> Path:
    """The folder for a run's files, absolute, made where missing; refuses to overwrite."""
    names = [PROMPTS, OUTPUTS, TIMING] + ([ROUTES] if mode != "no_log" else [])
    folders = [name for name in names if (out / name).is_dir()]
    if folders:
        raise UserError(f"{out / folders[0]} is a folder; move it away or choose another --out")
    files.prepare(out, names, force, "--out")
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} is not writable; choose another folder")
    return out.resolve()


def write_outputs(path: Path, outputs: Sequence[Any]) -> None:
    """``outputs.jsonl``: one object a request; joins the routes on ``req_id``."""
    with path.open("w", encoding="utf-8") as file:
        for output in outputs:
            choice = output.outputs[0]
            record = {
                "req_id": output.request_id,
                "prompt": output.prompt,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(choice.token_ids),
                "text": choice.text,
                "finish_reason": choice.finish_reason,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def move(stage: Path, out: Path) -> list[Path]:
    """Move the files of a run from ``stage`` to ``out``; those of an older run's ranks go."""
    stem = Path(ROUTES).stem
    new = [stage / name for name in (PROMPTS, OUTPUTS, TIMING) if (stage / name).exists()]
    new += sorted(stage.glob(f"{stem}*.jsonl"))
    for old in out.glob(f"{stem}.pp*.jsonl"):
        old.unlink()
    return [path.replace(out / path.name) for path in new]
