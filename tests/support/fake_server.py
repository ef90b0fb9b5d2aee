# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the expert-distribution API, without vLLM: what the live page is built against.

It speaks the JSON of the real routes over invented routing, with the page's own Content-Security-
Policy. Run it by hand to look at the page: ``python -m tests.support.fake_server --help``.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

PAGE = (
    Path(__file__).resolve().parents[2]
    / "overlay/vllm/entrypoints/serve/expert_distribution/page.html"
)
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MODES = ("stat", "per_pass", "per_token")
KINDS = ("prefill", "decode", "mixed")


class RefusedError(Exception):
    """An answer other than 200.

    Args:
        code: HTTP status.
        message: one line.
        extra: further fields of the answer.
    """

    def __init__(self, code: int, message: str, **extra: Any) -> None:
        super().__init__(message)
        self.code, self.body = code, {"status": "error", "message": message, **extra}


@dataclass
class FakeModel:
    """Routing that never happened: the state behind the routes.

    Args:
        layers: indices of the MoE layers; gaps are allowed.
        dp, pp, tp: parallel sizes. Every data-parallel replica sees each pass given to it, every
            pipeline stage holds its share of the layers, tensor-parallel copies count nothing.
    """

    layers: list[int] = field(default_factory=lambda: list(range(24)))
    experts: int = 60
    top_k: int = 4
    name: str = "stand-in model, invented numbers"
    dp: int = 1
    pp: int = 1
    tp: int = 1
    seed: int = 7
    failing: bool = False

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self._rng = np.random.default_rng(self.seed)
        shape = (len(self.layers), self.experts)
        appeal = self._rng.gamma(6.0, size=shape)
        appeal[:, 1] *= np.linspace(
            1, 3, len(self.layers)
        )  # one expert that gets hotter with depth
        appeal[len(self.layers) // 2, self.experts // 2] = 0  # one that is never chosen
        #: [L, E] probability that a choice falls on an expert.
        self.appeal = appeal / appeal.sum(axis=1, keepdims=True)
        self.mode, self.spec, self.path = "per_pass", "all", None
        self.recording = False
        self.since: float | None = None
        self.reset()

    def reset(self) -> None:
        """Everything counted goes back to zero."""
        size = (self.dp, len(self.layers), self.experts)
        #: kind of pass -> [dp, L, E] cumulative choices.
        self.counts = {kind: np.zeros(size, dtype=np.int64) for kind in KINDS}
        self.passes = [dict.fromkeys(KINDS, 0) for _ in range(self.dp)]
        self.tokens = [{"prefill": 0, "decode": 0} for _ in range(self.dp)]

    def run_pass(self, prefill: int, decode: int, replica: int = 0) -> None:
        """One forward pass over so many prefill and decode tokens; counts only while recording."""
        with self.lock:
            if not self.recording:
                return
            kind = "mixed" if prefill and decode else "prefill" if prefill else "decode"
            choices = (prefill + decode) * self.top_k
            self.counts[kind][replica] += self._rng.multinomial(choices, self.appeal)
            self.passes[replica][kind] += 1
            self.tokens[replica]["prefill"] += prefill
            self.tokens[replica]["decode"] += decode

    def stage_layers(self, stage: int) -> np.ndarray:
        """Positions in ``layers`` that a pipeline stage holds."""
        return np.array_split(np.arange(len(self.layers)), self.pp)[stage]

    # ---- the routes; each is called with the lock held and answers with the body of a 200 ----

    def configure(self, mode: str = "", layers: str = "all", path: str = "") -> dict[str, Any]:
        if self.recording:
            raise RefusedError(409, "recording: stop it before configuring")
        if mode not in MODES:
            raise RefusedError(
                400, f"mode must be one of {', '.join(MODES)}", valid_modes=list(MODES)
            )
        if layers != "all" and not set(layers) <= set("0123456789,-"):
            raise RefusedError(400, f"layers={layers!r} is not 'all' or indices such as 0,3-5")
        self.mode, self.spec, self.path = mode, layers, path or None
        return {"mode": mode, "layers": layers, "path": self.path, "message": "configured"}

    def start(self) -> dict[str, Any]:
        if self.recording:
            raise RefusedError(409, "already recording")
        self.reset()
        self.recording, self.since = True, time.time()
        message = f"recording in mode {self.mode}"
        return {"mode": self.mode, "since": self.since, "files": self.files(), "message": message}

    def stop(self) -> dict[str, Any]:
        if not self.recording:
            raise RefusedError(409, "nothing is recording: start first")
        self.recording = False
        return {"message": "recording stopped", "closing": False}

    def reset_counts(self) -> dict[str, Any]:
        if self.since is None:
            raise RefusedError(409, "there is nothing to reset: nothing was recorded yet")
        self.reset()
        self.since = time.time() if self.recording else None
        return {"message": "recording goes on from zero" if self.recording else "forgotten"}

    def files(self) -> list[str]:
        return [] if self.mode == "stat" else [self.path or f"{self.mode}-20261124-231501.jsonl"]

    def figures(self, replica: int, held: int) -> dict[str, Any]:
        """What a worker with ``held`` layers counts in status and summary alike."""
        rows = sum(self.tokens[replica].values()) * held
        drops = {"queue_full": 0, "not_captured": 0, "write_error": 0}
        if self.failing:
            drops.update(queue_full=rows // 90 + 3, not_captured=1)
        return {
            "passes": dict(self.passes[replica]),
            "tokens": dict(self.tokens[replica]),
            "rows": rows,
            "drops": drops,
        }

    def dump(self, summary_only: str = "true", max_records: str = "1000") -> dict[str, Any]:
        summaries, full = [], []
        for dp in range(self.dp):
            for stage in range(self.pp):
                held = self.stage_layers(stage)
                rank = (dp * self.pp + stage) * self.tp
                kinds = {kind: self.counts[kind][dp, held] for kind in KINDS}
                total = np.sum(list(kinds.values()), axis=0)
                worker = {
                    "rank": rank,
                    "recording_mode": self.mode,
                    "num_layers": len(held),
                    "num_experts": self.experts,
                    "num_records": sum(self.passes[dp].values()),
                    "sample_record": None,
                    "expert_choices": int(total.sum()),
                    "max_over_mean": float(total.max() / total.mean()) if total.any() else None,
                }
                summaries.append({**worker, **self.figures(dp, len(held))})
                full.append(
                    {
                        "rank": rank,
                        "layers": [self.layers[i] for i in held],
                        "top_k": self.top_k,
                        "num_experts": self.experts,
                        "counts": {kind: values.tolist() for kind, values in kinds.items()},
                        "records": [],
                        "records_omitted": worker["num_records"],
                        "files": self.files(),
                    }
                )
        body: dict[str, Any] = {"num_workers": len(full), "summary": {"workers": summaries}}
        return body if summary_only == "true" else {**body, "workers": full}

    def status(self) -> dict[str, Any]:
        workers = []
        for rank in range(self.dp * self.pp * self.tp):
            dp, stage, tp = rank // (self.pp * self.tp), rank // self.tp % self.pp, rank % self.tp
            place = {"rank": rank, "dp": dp, "pp": stage, "tp": tp, "records": tp == 0}
            held = len(self.stage_layers(stage)) if tp == 0 else 0
            figures = self.figures(dp, held)
            if tp:
                figures |= {
                    "passes": dict.fromkeys(KINDS, 0),
                    "tokens": dict.fromkeys(KINDS[:2], 0),
                }
                figures["drops"] = dict.fromkeys(figures["drops"], 0)
            workers.append(
                {
                    **place,
                    **figures,
                    "mode": self.mode,
                    "recording": self.recording and tp == 0,
                    "since": self.since,
                    "bytes": figures["rows"] * 26,
                    "files": self.files() if self.since and tp == 0 else [],
                    "waiting_bytes": 0,
                    "self_check": self.self_check() if self.since and tp == 0 else None,
                    "error": "OSError: no space left on device"
                    if self.failing and tp == 0
                    else None,
                }
            )
        detail = (
            "ranks 0 and 1 counted 1,204 and 1,203 rows"
            if self.failing
            else f"{len(workers)} of {len(workers)} on the same settings"
        )
        return {
            "available": True,
            "mode": self.mode,
            "layers": self.spec,
            "path": self.path,
            "recording": self.recording,
            "closing": False,
            "since": self.since if self.recording else None,
            "now": time.time(),
            "model": self.name,
            "num_workers": len(workers),
            "agreement": {"ok": not self.failing, "detail": detail},
            "workers": workers,
        }

    def self_check(self) -> dict[str, Any]:
        verdict = "fail" if self.failing else "pass"
        bad = "17 repeated in layer 5" if self.failing else "0 rows with a repeated id"
        checks = [
            {"name": "every layer fired", "verdict": "pass", "detail": "0 rows not captured"},
            {"name": "ids of a row are distinct", "verdict": verdict, "detail": bad},
        ]
        return {"verdict": verdict, "checks": checks}


class FakeServer:
    """Serves a :class:`FakeModel` and the page on a free port until the ``with`` block ends.

    Args:
        api_key: when set, every route but the page asks for it.
        root_path: prefix in front of all routes, as behind a proxy.
    """

    def __init__(
        self, model: FakeModel, api_key: str = "", root_path: str = "", port: int = 0
    ) -> None:
        self.model, self.api_key, self.root_path = model, api_key, root_path
        #: One code a path: the next requests to it fail with this, until it is removed.
        self.broken: dict[str, int] = {}
        #: (method, path) of every request, in order.
        self.requests: list[tuple[str, str]] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}{root_path}/expert_distribution"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, target: str, authorization: str) -> dict[str, Any]:
        """The body of a 200, or :class:`RefusedError`."""
        routes = {
            "/expert_distribution_status": ("GET", self.model.status),
            "/configure_expert_distribution": ("POST", self.model.configure),
            "/start_expert_distribution": ("POST", self.model.start),
            "/stop_expert_distribution": ("POST", self.model.stop),
            "/reset_expert_distribution": ("POST", self.model.reset_counts),
            "/dump_expert_distribution": ("POST", self.model.dump),
        }
        url = urlsplit(target)
        path = url.path.removeprefix(self.root_path)
        self.requests.append((method, path))
        if path not in routes or not url.path.startswith(self.root_path):
            raise RefusedError(404, f"no route {url.path}")
        wanted, route = routes[path]
        if method != wanted:
            raise RefusedError(405, f"{path} takes {wanted}")
        if self.api_key and authorization != f"Bearer {self.api_key}":
            raise RefusedError(401, "this route needs the server's API key")
        if path in self.broken:
            raise RefusedError(self.broken[path], "the engine did not answer in time")
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        with self.model.lock:
            try:
                return {"status": "success", **route(**query)}
            except TypeError as error:
                raise RefusedError(400, f"unknown parameter: {error}") from error

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if urlsplit(self.path).path == f"{server.root_path}/expert_distribution":
                    self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
                else:
                    self.do_POST()

            def do_POST(self) -> None:
                key = self.headers.get("Authorization", "")
                try:
                    code, body = 200, server.answer(self.command, self.path, key)
                except RefusedError as refused:
                    code, body = refused.code, refused.body
                self._send(code, "application/json", json.dumps(body).encode())

            def _send(self, code: int, kind: str, content: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Security-Policy", POLICY)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                """Say nothing: the tests read ``requests``."""

        return Handler


def traffic(model: FakeModel, seconds: float) -> None:
    """Passes of a server under changing load, for so long."""
    rng = np.random.default_rng(1)
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        for replica in range(model.dp):
            kind = rng.choice(3, p=[0.07, 0.75, 0.18])
            decode = int(rng.integers(8, 24) * (1.4 + np.sin(elapsed / 9))) + 1
            prefill = int(rng.integers(30, 400))
            model.run_pass(prefill if kind != 1 else 0, decode if kind else 0, replica)
        time.sleep(0.04)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--root-path", default="")
    parser.add_argument("--failing", action="store_true", help="lose rows and fail a check")
    parser.add_argument("--record", action="store_true", help="come up recording")
    args = parser.parse_args(argv)
    model = FakeModel(
        layers=list(range(args.layers)),
        experts=args.experts,
        dp=args.dp,
        pp=args.pp,
        tp=args.tp,
        failing=args.failing,
    )
    if args.record:
        model.start()
    with FakeServer(model, args.api_key, args.root_path, args.port) as server:
        print(f"{server.url} (stop with Ctrl-C)")
        traffic(model, float("inf"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
