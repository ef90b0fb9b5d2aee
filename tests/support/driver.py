"""Run vLLM engines, each in a process of its own, through lists of steps.

Imports vLLM once, which takes longer than a tiny engine's start, then forks a process for every
line on stdin. A line is a JSON object:

    engine: arguments of ``vllm.LLM``
    env: environment variables of this engine
    result, log: files for what came of it and for what it printed
    async_scheduling: run AsyncScheduler, with stand-ins for CUDA's streams (CPU has none)
    steps: list of steps, in order, each one of
        {"generate": [prompts], "sampling": {...}, "watch": path or null}
        {"embed": [prompts]}
        {"events": [[step, "add", id, prompt, sampling] | [step, "abort", id]]}
        {"rpc": command, "options": {...}}
        {"probe": "threads" | "ops" | "where"}

It answers every line with the process's exit code. ``watch`` reads a growing log while the engine
writes it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


class Watcher(threading.Thread):
    """Parses every complete line of a growing file, again and again, until told to stop."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._path = Path(path)
        self._done = threading.Event()
        self.line_counts: list[int] = []
        self.bad_lines: list[str] = []

    def run(self) -> None:
        while not self._done.wait(0.05):
            lines = self._path.read_bytes().split(b"\n")[:-1]
            for line in lines:
                try:
                    json.loads(line)
                except ValueError:
                    self.bad_lines.append(line.decode(errors="replace")[:200])
            self.line_counts.append(len(lines))

    def stop(self) -> dict[str, Any]:
        self._done.set()
        self.join()
        return {"line_counts": self.line_counts, "bad_lines": self.bad_lines}


class NoStream:
    """Stands in for a CUDA stream: everything is done at once, so nothing is waited for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    record = synchronize = lambda self, *args: None  # as an event


def run_ahead() -> None:
    """Let the CPU backend schedule asynchronously, one step ahead of the sampled tokens."""
    import contextlib

    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker import cpu_model_runner

    cpu_model_runner._torch_cuda_wrapper = contextlib.nullcontext  # vLLM's own stand-ins do less
    torch.cuda.Stream = torch.Event = NoStream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = NoStream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keep)  # type: ignore[assignment]


def result_of(output: Any) -> dict[str, Any]:
    return {
        "req_id": output.request_id,
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": list(output.outputs[0].token_ids),
        "all_token_ids": [list(choice.token_ids) for choice in output.outputs],
        "finish_reason": output.outputs[0].finish_reason,
        "cached_tokens": output.num_cached_tokens,
    }


def play(llm: Any, events: list[list[Any]]) -> dict[str, Any]:
    """Add and abort requests between given steps of the engine."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    finished: dict[str, Any] = {}
    partial: dict[str, Any] = {}
    last = max(event[0] for event in events)
    step = 0
    while step <= last or engine.has_unfinished_requests():
        for _, kind, req_id, *rest in (event for event in events if event[0] == step):
            if kind == "add":
                engine.add_request(req_id, rest[0], SamplingParams(**rest[1]))
            else:
                engine.abort_request([req_id])
        for output in engine.step():
            partial[output.request_id] = result_of(output)
            if output.finished:
                finished[output.request_id] = partial.pop(output.request_id)
        step += 1
    return {"outputs": list(finished.values()), "unfinished": list(partial.values())}


def generate(llm: Any, step: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    watcher = Watcher(step["watch"]) if step.get("watch") else None
    if watcher:
        watcher.start()
    outputs = llm.generate(step["generate"], SamplingParams(**step["sampling"]), use_tqdm=False)
    return {
        "outputs": [result_of(output) for output in outputs],
        "watched": watcher.stop() if watcher else None,
    }


def probe_ops(llm: Any) -> list[str]:
    """Names of the ops that one forward pass runs; needs an engine in this process."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm import SamplingParams

    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        llm.generate(["probe"], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    return seen


def run(spec: dict[str, Any]) -> None:
    """One engine, from its start to its last step."""
    if spec["async_scheduling"]:
        run_ahead()
    import vllm

    llm = vllm.LLM(**spec["engine"])
    results: list[Any] = []
    for step in spec["steps"]:
        if "generate" in step:
            results.append(generate(llm, step))
        elif "rpc" in step:
            options = step.get("options", {})
            results.append(llm.collective_rpc("moe_routes", args=(step["rpc"],), kwargs=options))
        elif "events" in step:
            results.append(play(llm, step["events"]))
        elif "embed" in step:
            outputs = llm.embed(step["embed"], use_tqdm=False)
            results.append([[out.request_id, list(out.prompt_token_ids)] for out in outputs])
        elif step["probe"] == "where":
            results.append(vllm.__file__)
        elif step["probe"] == "ops":
            results.append(probe_ops(llm))
        else:
            results.append([thread.name for thread in threading.enumerate()])
    text = json.dumps({"results": results}, default=bytes.hex)  # a dump's counts are bytes
    Path(spec["result"]).write_text(text, encoding="utf-8")


def main() -> int:
    # What a tiny engine imports, before the first fork.
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.model_executor.models.qwen2_moe
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        spec = json.loads(line)
        child = os.fork()
        if child == 0:
            with open(spec["log"], "wb") as log:  # noqa: PTH123
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(spec["env"])
            run(spec)
            return 0
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
