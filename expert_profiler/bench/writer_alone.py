# SPDX-License-Identifier: Apache-2.0
"""The writer alone, on made-up passes of DeepSeek-V3's shape: its speed, steadiness and memory.

python -m expert_profiler.bench.writer_alone PLAN FOLDER

``PLAN`` is an object with ``rows``, ``seconds`` and ``minutes``; see ``cases.Plan``. Prints one
line of JSON. The recorder's own queue, thread, self-check and formats run; only the model is
missing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expert_profiler.files import remove

#: DeepSeek-V3: 58 of its 61 layers are MoE; all 61 counted here, as if each were.
LAYERS, EXPERTS, TOP_K = 61, 256, 8
#: Tokens of a pass: a decode batch.
BATCH = 256
#: Positions that a request stays for.
REQUEST_TOKENS = 256
#: Rows a second of that shape at about 10,000 tokens a second.
SUSTAINED_ROWS = 580_000
#: Of the memory run: the load of the headline case, simulated faster than it happens.
MEMORY_LAYERS, MEMORY_EXPERTS, MEMORY_TOP_K, MEMORY_BATCH, MEMORY_STEPS = 24, 60, 4, 25, 20
QUEUE_BYTES = 64 << 20
#: Passes after which the same choices come again: far more bytes than a compressor looks back.
DISTINCT_PASSES = 32


class Shape(NamedTuple):
    """A model's routing and the batch that runs on it."""

    layers: int
    experts: int
    top_k: int
    batch: int

    @property
    def rows(self) -> int:
        """Rows a pass."""
        return self.layers * self.batch


class Load:
    """Endless decode passes of ``shape.batch`` requests, each replaced when it is done.

    Args:
        shape: of the passes.
        request_tokens: positions a request stays for.
    """

    def __init__(self, shape: Shape, request_tokens: int = REQUEST_TOKENS) -> None:
        import torch
        from vllm.moe_routes.capture import buffer
        from vllm.moe_routes.capture.snapshot import HostSnapshotter
        from vllm.moe_routes.layers import MoELayer

        self.shape = shape
        self.layers = [
            MoELayer(i, f"layers.{i}", shape.top_k, shape.experts, "router", False, "softmax")
            for i in range(shape.layers)
        ]
        self.buffer = buffer.allocate(
            self.layers, DISTINCT_PASSES * shape.batch, torch.device("cpu")
        )
        rng = np.random.default_rng(0)
        self.buffer.ids.copy_(torch.from_numpy(random_ids(rng, self.buffer.ids.shape, shape)))
        weights = rng.random(self.buffer.weights.shape, dtype=np.float32)
        self.buffer.weights.copy_(torch.from_numpy(weights))
        self._snapshotter = HostSnapshotter()
        self._request_tokens = request_tokens
        self._ages = np.arange(shape.batch) * request_tokens // shape.batch
        self._names = [f"{i}-{i:08x}" for i in range(shape.batch)]
        self._started = shape.batch
        self._id = 0

    def step(self) -> Any:
        """The next pass, as ``TokenRecording`` hands it over; takes its snapshot."""
        from vllm.moe_routes.writing.rows import Step

        size = self.shape.batch
        over = self._ages >= self._request_tokens
        finished = [self._names[i] for i in np.flatnonzero(over)]
        for i in np.flatnonzero(over):
            self._names[i] = f"{self._started}-{self._started:08x}"
            self._started += 1
        self._ages[over] = 0
        first = (self._id % DISTINCT_PASSES) * size
        view = self.buffer._replace(
            ids=self.buffer.ids[first:], weights=self.buffer.weights[first:]
        )
        step = Step(
            forward_pass_id=self._id,
            req_ids=self._names.copy(),
            num_scheduled_tokens=np.ones(size, dtype=np.int32),
            num_computed_tokens=self._ages.astype(np.int32),
            num_prompt_tokens=np.ones(size, dtype=np.int32),
            new_requests={self._names[i] for i in np.flatnonzero(self._ages == 0)},
            stop_rules={},
            finished=finished,
            pending=self._snapshotter.take(view, size, None),
        )
        self._ages += 1
        self._id += 1
        return step


def random_ids(
    rng: np.random.Generator, size: tuple[int, ...], shape: Shape
) -> npt.NDArray[np.int64]:
    """[n, L, K] expert ids, distinct within a row, in random order."""
    groups = np.arange(shape.top_k) * (shape.experts // shape.top_k)
    ids = rng.integers(0, shape.experts // shape.top_k, size=size) + groups
    ids += rng.integers(0, shape.experts, size=(*size[:-1], 1))
    return rng.permuted(ids % shape.experts, axis=-1)


def session(load: Load, path: Path) -> Any:
    """A recording of ``load`` into ``path``."""
    from vllm.moe_routes.writing.token_log import TokenLog

    header = {"type": "meta", "model_id": "synthetic", "layers_logged": list(range(LAYERS))}
    return TokenLog(path, header, load.layers, load.buffer.not_an_id)


def throughput(path: Path, rows: int) -> dict[str, Any]:
    """Rows a CPU second of the whole process, from a pass's snapshot to a closed file.

    One CPU second is one core for a second, whatever threads the formats use; nothing that other
    processes do on the machine counts.
    """
    load = Load(Shape(LAYERS, EXPERTS, TOP_K, BATCH))
    steps = [load.step() for _ in range(-(-rows // load.shape.rows))]
    sink = session(load, path)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        sink.consume(step)
    sink.close("bench")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    written: int = sink.rows
    return {
        "rows": written,
        "bytes": size_of(path),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "rows_per_cpu_second": written / cpu,
        "rows_per_second": written / wall,
        "self_check": sink.verdict()["verdict"],
    }


def sustained(path: Path, seconds: float) -> dict[str, Any]:
    """Feed passes at ``SUSTAINED_ROWS`` a second of real time; a full queue drops."""
    from vllm.moe_routes.writing.writer import Writer

    load = Load(Shape(LAYERS, EXPERTS, TOP_K, BATCH))
    sink = session(load, path)
    writer = Writer(sink, QUEUE_BYTES, "drop", flush_seconds=30.0)
    interval = load.shape.rows / SUSTAINED_ROWS
    most_waiting, late = 0, 0
    start = time.perf_counter()
    fed = int(seconds / interval)
    for i in range(fed):
        ahead = start + i * interval - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
        late += ahead < -1.0  # the feeder itself can't keep up: the rate was not reached
        writer.put(load.step())
        most_waiting = max(most_waiting, writer.waiting_bytes)
    feeding = time.perf_counter() - start
    writer.close("bench", timeout=600)
    return {
        "rows": sink.rows,
        "rows_per_second": fed * load.shape.rows / feeding,
        "seconds": feeding,
        "passes_fed_late": late,
        "drops": dict(sink.drops),
        "most_waiting_bytes": most_waiting,
        "queue_bytes": QUEUE_BYTES,
        "self_check": sink.verdict()["verdict"],
    }


def worst_memory(path: Path, rows: float) -> dict[str, Any]:
    """Resident memory with DeepSeek-V3's shape, the queue full all the time."""
    return fill(path, Shape(LAYERS, EXPERTS, TOP_K, BATCH), rows, BATCH * LAYERS * 20)


def memory(path: Path, minutes: float) -> dict[str, Any]:
    """Resident memory over simulated minutes of the headline case's load.

    Simulated: 20 passes of 25 tokens in 24 layers make a second, 12,000 rows, and they are fed as
    fast as the writer takes them, the queue full all the time. What could grow with time does so:
    passes, requests, parts, flushes.
    """
    shape = Shape(MEMORY_LAYERS, MEMORY_EXPERTS, MEMORY_TOP_K, MEMORY_BATCH)
    a_minute = 60 * MEMORY_STEPS * shape.rows
    record = fill(path, shape, minutes * a_minute, a_minute / 6)
    record["samples"] = [[rows / a_minute, used] for rows, used in record["samples"]]
    return {**record, "simulated_minutes": minutes}


def fill(path: Path, shape: Shape, rows: float, sample_rows: float) -> dict[str, Any]:
    """Feed ``rows`` rows into a queue that blocks when full.

    Returns:
        ``samples``: [rows fed, bytes of resident memory above those before the recording], one
        every ``sample_rows`` rows at least.
    """
    from vllm.moe_routes.writing.writer import Writer

    load = Load(shape)
    own = resident()
    sink = session(load, path)
    writer = Writer(sink, QUEUE_BYTES, "block", flush_seconds=30.0)
    samples: list[list[float]] = []
    fed, due = 0, sample_rows
    start = time.perf_counter()
    while fed < rows:
        writer.put(load.step())
        fed += shape.rows
        if fed >= due or fed >= rows:
            samples.append([float(fed), float(resident() - own)])
            due += sample_rows
    writer.close("bench", timeout=600)
    return {
        "seconds": time.perf_counter() - start,
        "rows": sink.rows,
        "requests": sink.requests,
        "buffer_bytes": load.buffer.nbytes,
        "queue_bytes": QUEUE_BYTES,
        "samples": samples,
        "bytes": size_of(path),
    }


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def main() -> int:
    plan, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM greets on stdout
    import torch

    torch.set_num_threads(1)
    result: dict[str, Any] = {"shape": [LAYERS, EXPERTS, TOP_K]}
    for suffix in ("parquet", "jsonl"):
        path = folder / f"synthetic.{suffix}"
        throughput(path, 50_000)  # imports, first touches
        remove(path)
        result[suffix] = throughput(path, plan["rows"])
        remove(path)
    for name, run, amount in (
        ("sustained", sustained, plan["seconds"]),
        ("memory", memory, plan["minutes"]),
        ("worst_memory", worst_memory, plan["rows"]),
    ):
        path = folder / f"{name}.parquet"
        result[name] = run(path, amount)
        remove(path)
    answers.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
