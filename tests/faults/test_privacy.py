# SPDX-License-Identifier: Apache-2.0
"""What a route log may hold of a request: its id and lengths, and nothing of its text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from vllm.moe_routes.recorder import control

from tests.faults.load import Load, arm
from tests.support.build import read_lines

#: Everything that a line may say; a new key needs a look at what it gives away.
KEYS = {
    "route": {
        "type", "req_id", "token_idx", "layer", "topk_ids", "topk_weights", "phase",
        "forward_pass_id", "flag",
    },
    "request": {
        "type", "req_id", "raw_id", "num_prompt_tokens", "cached_tokens", "missed_tokens",
        "positions", "rows_flagged", "rows_dropped", "finished",
    },
}  # fmt: skip


def test_a_route_log_says_nothing_of_prompts_or_tokens(tmp_path: Path) -> None:
    """The recorder sees token ids where the engine runs ahead; they end there."""
    path = tmp_path / "x.jsonl"
    runner = arm(path)
    runner.use_async_scheduling = True
    secret = (31_337, 27_182, 31_415)
    runner.execute(("7-0000000a", 3, 3), tokens=secret)
    Load(runner).step()
    assert control(SimpleNamespace(model_runner=runner), "stop")["ok"]
    text = path.read_text()
    assert not any(str(token) in text for token in secret)
    for line in read_lines(path):
        assert set(line) <= KEYS.get(line["type"], set(line)), line


def test_a_header_says_nothing_of_the_machine(tmp_path: Path) -> None:
    """Versions, the model's name and the device's; no host name, user, path or environment."""
    import getpass
    import socket

    path = tmp_path / "x.jsonl"
    runner = arm(path)
    assert control(SimpleNamespace(model_runner=runner), "stop")["ok"]
    header = path.read_text().splitlines()[0]
    for name in (socket.gethostname(), str(tmp_path), f'"{getpass.getuser()}"'):
        assert name not in header
