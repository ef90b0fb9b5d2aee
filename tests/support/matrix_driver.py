"""Run several vLLM engines in one process, each with a log of its own.

Starting a process costs more than starting a tiny engine, and one process with many engines shows
that recordings don't get into each other's files. Reads a JSON list of groups from stdin. The
engines of a group live together and take turns, prompt by prompt; groups follow each other. An
engine is

    name: of the engine
    engine: arguments of ``vllm.LLM``
    env: environment variables of its start
    bfloat16: names of parameters to cast to bfloat16 once the model is loaded
    prompts: list of texts
    sampling: arguments of ``vllm.SamplingParams``
    kernel: path of the .npz for what the MoE kernels were given

The file named by the argument gets {name: {"outputs": […], "stop": …} or {"error": …, "at": …}}.
``at`` is the place in vLLM that raised, "file:line".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


class KernelSpy:
    """Keeps what vLLM's MoE kernels on CPU are given: a second witness beside the recorder.

    It sits around the functions that multiply, behind the recorder's hook, and at the place where
    the router's logits come in.
    """

    def __init__(self) -> None:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

        #: Arrays [n, …], one a call, by "module name/logits", "…/ids", "…/weights". None: not
        #: looking.
        self.seen: dict[str, list[Any]] | None = None
        for name in ("forward_grouped_gemm", "forward_torch"):
            setattr(CPUFusedMOE, name, self._watch_kernel(getattr(CPUFusedMOE, name)))
        CPUFusedMOE.__call__ = self._watch_router(CPUFusedMOE.__call__)

    def _keep(self, layer: Any, **tensors: Any) -> None:
        if self.seen is not None:
            for name, tensor in tensors.items():
                copy = tensor.float() if tensor.is_floating_point() else tensor
                self.seen[f"{layer.layer_name}/{name}"].append(copy.clone().numpy())

    def _watch_kernel(self, kernel: Any) -> Any:
        def watched(itself: Any, layer: Any, x: Any, weights: Any, ids: Any, *rest: Any) -> Any:
            self._keep(layer, ids=ids, weights=weights)
            return kernel(itself, layer, x, weights, ids, *rest)

        return watched

    def _watch_router(self, call: Any) -> Any:
        def watched(
            itself: Any, layer: Any, x: Any, grouped: Any, top_k: Any, logits: Any, *rest: Any
        ) -> Any:
            self._keep(layer, logits=logits)
            return call(itself, layer, x, grouped, top_k, logits, *rest)

        return watched


def inspect_models_here() -> None:
    """Let vLLM look at a model's class in this process; it starts one more for each, for CUDA."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


class Engine:
    """One engine and its results."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import vllm.envs
        from vllm import LLM

        self.spec = spec
        self.seen: dict[str, list[Any]] = defaultdict(list)
        self.outputs: list[Any] = []
        before = dict(os.environ)
        os.environ.update(spec["env"])
        vllm.envs.disable_envs_cache()  # the engine before this one has left its own
        try:
            self.llm = LLM(**spec["engine"])
        finally:
            for key in spec["env"]:
                os.environ.pop(key)
                if key in before:
                    os.environ[key] = before[key]
        self.llm.apply_model(self._cast)

    def _cast(self, model: Any) -> None:
        import torch

        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in self.spec["bfloat16"]:
                parameter.data = parameter.data.to(torch.bfloat16)

    def generate(self, prompts: list[str], spy: KernelSpy) -> None:
        from vllm import SamplingParams

        from tests.support.driver import result_of

        spy.seen = self.seen
        params = SamplingParams(**self.spec["sampling"])
        try:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        finally:
            spy.seen = None
        self.outputs += [result_of(output) for output in outputs]

    def finish(self) -> dict[str, Any]:
        import numpy as np

        stop = self.llm.collective_rpc("moe_routes", args=("stop",))
        arrays = {name: np.concatenate(calls) for name, calls in self.seen.items()}
        np.savez(self.spec["kernel"], **arrays)
        return {"outputs": self.outputs, "stop": stop}


def failure(error: BaseException) -> dict[str, str]:
    """What an engine that can't start says, and where in vLLM it says so."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "/vllm/" in frame.filename]
    at = inside[-1] if inside else frames[-1]
    return {
        "error": f"{type(error).__name__}: {error}",
        "at": f"{at.filename.rpartition('/vllm/')[2]}:{at.lineno}",
    }


def run_group(specs: list[dict[str, Any]], spy: KernelSpy) -> dict[str, Any]:
    """Run the engines of a group side by side."""
    results: dict[str, Any] = {}
    engines: list[Engine] = []

    def guard(name: str, action: Callable[..., None], *args: Any) -> None:
        if "error" in results.get(name, ()):
            return
        try:
            action(*args)
        except Exception as error:
            traceback.print_exc()
            results[name] = failure(error)

    for spec in specs:
        guard(spec["name"], lambda spec: engines.append(Engine(spec)), spec)
    # Two prompts a turn: batches of several requests, and engines that alternate.
    for first in range(0, max(len(spec["prompts"]) for spec in specs), 2):
        for engine in engines:
            turn = engine.spec["prompts"][first : first + 2]
            guard(engine.spec["name"], engine.generate, turn, spy)
    for engine in engines:
        results.setdefault(engine.spec["name"], {}).update(engine.finish())
    return results


def main() -> int:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    inspect_models_here()
    spy = KernelSpy()
    results: dict[str, Any] = {}
    for group in json.load(sys.stdin):
        results |= run_group(group, spy)
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
