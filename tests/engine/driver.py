"""Run one vLLM engine through a list of steps and print what came of it.

A process of its own, because an engine can't be restarted in one. Reads a JSON object from stdin:

    engine: arguments of ``vllm.LLM``
    steps: list of steps, in order, each one of
        {"generate": [prompts], "sampling": {...}, "watch": path or null}
        {"rpc": command, "options": {...}}
        {"probe": "threads" | "ops"}

and writes {"results": [one a step]} to the file named by its argument. ``watch`` reads a growing
log while the engine writes it.
"""

from __future__ import annotations

import json
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


def generate(llm: Any, step: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    watcher = Watcher(step["watch"]) if step.get("watch") else None
    if watcher:
        watcher.start()
    outputs = llm.generate(step["generate"], SamplingParams(**step["sampling"]), use_tqdm=False)
    return {
        "outputs": [
            {
                "req_id": output.request_id,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(output.outputs[0].token_ids),
            }
            for output in outputs
        ],
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


def main() -> int:
    spec = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**spec["engine"])
    results: list[Any] = []
    for step in spec["steps"]:
        if "generate" in step:
            results.append(generate(llm, step))
        elif "rpc" in step:
            options = step.get("options", {})
            results.append(llm.collective_rpc("moe_routes", args=(step["rpc"],), kwargs=options))
        elif step["probe"] == "ops":
            results.append(probe_ops(llm))
        else:
            results.append([thread.name for thread in threading.enumerate()])
    Path(sys.argv[1]).write_text(json.dumps({"results": results}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
