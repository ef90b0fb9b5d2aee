# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own, driven by lines of JSON from ``engine_process``.

python -m expert_profiler.bench.engine_worker MODEL FOLDER

The first line on stdout says that it is ready. Every line of stdin is an object with ``do`` and
its arguments; one line of JSON answers it. Everything else that this process prints goes to
FOLDER/engine.log.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from expert_profiler.bench.cases import MODES, Case, Mode
from expert_profiler.bench.mode_switch import Switch
from expert_profiler.bench.probes import Probes

#: Token ids below this are plain bytes in the tiny checkpoint, and words in any other.
VOCABULARY = 256


class Bench:
    """An engine and what can be asked of it; every public method is a command."""

    def __init__(self, model: str, folder: Path) -> None:
        from vllm.entrypoints.llm import LLM

        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=1024,
            enforce_eager=True,  # as expert-profiler profile does on CPU
            enable_prefix_caching=False,  # a cached prefix is never routed
            seed=1234,
        )
        self._switch = Switch(self._llm, folder)
        self._probes = Probes()

    def run(self, mode: str, case: dict[str, int], layers: str | None = None) -> dict[str, Any]:
        """One timed pass.

        Returns:
            ``wall`` seconds, from before the recording starts until its file is closed;
            ``generate`` seconds of it; ``ttft`` seconds to every request's first token; ``gaps``
            seconds between a request's tokens, all requests together as one batch runs them;
            ``tokens``, a digest of all tokens generated; ``moe_layers`` of the model; and what the
            recording left.
        """
        load, chosen = Case(**case), _mode(mode, layers)
        prompts = _prompts(load)
        self._switch.prepare(chosen)
        start = time.perf_counter()
        self._switch.begin(chosen)
        begun = time.perf_counter()
        stamps, tokens = self._generate(prompts, load.output_tokens)
        ended = time.perf_counter()
        outcome = self._switch.end(chosen)
        wall = time.perf_counter() - start
        size = self._switch.clean(chosen)
        return {
            "wall": wall,
            "generate": ended - begun,
            "ttft": [request[0] - begun for request in stamps],
            "gaps": _gaps(stamps),
            "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
            "generated": sum(len(item) for item in tokens),
            "bytes": size,
            "moe_layers": len(
                self._llm.llm_engine.vllm_config.compilation_config.static_all_moe_layers
            ),
            **outcome._asdict(),
        }

    def profile(self, mode: str, case: dict[str, int], layers: str | None = None) -> dict[str, Any]:
        """One pass with probes in the recorder: seconds and calls of every part."""
        with self._probes.on():
            self._probes.take()
            result = self.run(mode, case, layers)
            result["parts"] = {k: v._asdict() for k, v in self._probes.take().items()}
        return result

    def ops(self) -> list[str]:
        """Names of all ops that one prefill and one decode step dispatch."""
        from torch.utils._python_dispatch import TorchDispatchMode

        seen: list[str] = []

        class Recorder(TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        with Recorder():
            self._generate(_prompts(Case(4, 1, 2)), 2)
        return seen

    def _generate(
        self, prompts: list[list[int]], output_tokens: int
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Time stamps and token ids of every request; all requests start together."""
        from vllm.sampling_params import SamplingParams

        sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        engine = self._llm.llm_engine
        stamps: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                ids = output.outputs[0].token_ids
                i = int(output.request_id)
                if len(ids) > len(tokens[i]):
                    stamps[i].append(now)
                    tokens[i] = list(ids)
        return stamps, tokens


def _mode(name: str, layers: str | None) -> Mode:
    mode = MODES[name]
    return mode if layers is None else mode._replace(layers=layers)


def _prompts(case: Case) -> list[list[int]]:
    """The same prompts for the same case, every time: [batch][prompt_tokens]."""
    import numpy as np

    rng = np.random.default_rng([case.prompt_tokens, case.batch])
    ids: list[list[int]] = rng.integers(
        0, VOCABULARY, size=(case.batch, case.prompt_tokens)
    ).tolist()
    return ids


def _gaps(stamps: list[list[float]]) -> list[float]:
    """Seconds between successive tokens, each engine step once."""
    seen = sorted({pair for request in stamps for pair in itertools.pairwise(request)})
    return [b - a for a, b in seen]


def serve(bench: Bench, commands: IO[str], answers: IO[str]) -> None:
    """Answer commands until there are no more."""
    for line in commands:
        command = json.loads(line)
        result = getattr(bench, command.pop("do"))(**command)
        print(json.dumps(result), file=answers, flush=True)


def main() -> int:
    model, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    with (folder / "engine.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    bench = Bench(model, folder)
    print(json.dumps("ready"), file=answers, flush=True)
    serve(bench, sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
