"""The routes reach every engine of a data-parallel ``vllm serve``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.server.test_server import PROMPTS, TOP_K, at_once, executed
from tests.support.served import VllmServer

LAYERS = 2


@pytest.mark.engine
@pytest.mark.timeout(420)
def test_two_engines_record_and_are_counted_once_each(tmp_path: Path) -> None:
    build(tmp_path / "model", TinyMoeSpec(layers=LAYERS))
    env = {
        "VLLM_LOG_MOE_API": "1",
        "VLLM_LOG_MOE_DIR": str(tmp_path / "serve" / "recordings"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    server = VllmServer(tmp_path / "model", tmp_path / "serve", env, ["--data-parallel-size", "2"])
    try:
        server.wait()
        for mode in ("stat", "per_pass", "per_token"):
            server.post("configure", mode=mode)
            server.post("start")
            tokens = executed(at_once(server, PROMPTS * 3))
            dump = server.post("dump", summary_only=False)
            server.post("stop")
            counted = sum(
                np.sum([worker["counts"][kind] for kind in worker["counts"]], axis=(0, 2))
                for worker in dump["workers"]
            )
            assert counted.tolist() == [tokens * TOP_K] * LAYERS
            per_engine = [sum(w["tokens"].values()) for w in dump["summary"]["workers"]]
            assert all(per_engine), "both engines had requests"
        status = server.status()
        assert [worker["dp"] for worker in status["workers"]] == [0, 1]
        assert status["agreement"]["ok"]
        files = [name for worker in status["workers"] for name in worker["files"]]
        assert files[1] == files[0].replace(".jsonl", ".dp1.jsonl")
        assert all((server.recordings / name).exists() for name in files)
    finally:
        server.stop()
