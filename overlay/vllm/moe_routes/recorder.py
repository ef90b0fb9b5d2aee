# SPDX-License-Identifier: Apache-2.0
"""One recorder a worker: armed when the model is loaded, started and stopped at step boundaries."""

import atexit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.moe_routes import capture, formats, layers, provenance, support
from vllm.moe_routes.config import RouteLogConfig, log_path
from vllm.moe_routes.errors import RouteLogError
from vllm.moe_routes.hooks import LogicalIds, Tap
from vllm.moe_routes.mapping import Layout
from vllm.moe_routes.rows import Step, StopRule
from vllm.moe_routes.session import Session
from vllm.moe_routes.snapshot import SNAPSHOTTERS
from vllm.moe_routes.writer import Writer
from vllm.utils.math_utils import round_up

logger = init_logger(__name__)

#: Closing must fit into the five seconds that vLLM gives a worker to shut down.
SHUTDOWN_SECONDS = 4.0
STOP_SECONDS = 300.0


def attach(runner: Any) -> "Recorder | None":
    """Arm recording on a loaded model, before it is compiled. None while the switch is unset.

    Args:
        runner: the ``GPUModelRunner`` (or ``CPUModelRunner``) that holds the model.

    Raises:
        RouteLogError: the switches, the model or the engine's mode don't allow it.
    """
    config = RouteLogConfig.from_env()
    if config is None:
        return None
    return Recorder(config, runner)


def control(worker: Any, *command: Any, **options: Any) -> dict[str, Any]:
    """What ``collective_rpc("moe_routes", (command,), options)`` reaches on a worker."""
    recorder: Recorder | None = getattr(worker.model_runner, "moe_routes", None)
    if recorder is None:
        return {"ok": False, "error": "recording is off in this engine; start it with VLLM_LOG_MOE"}
    return recorder.control(*command, **options)


def shutdown(worker: Any) -> None:
    """Close what is open when ``worker`` goes down, however far it had come up."""
    recorder = getattr(getattr(worker, "model_runner", None), "moe_routes", None)
    if recorder is not None:
        recorder.shutdown()


class Recorder:
    """Turns real forward passes of one worker into a log.

    Every method runs on the worker's engine thread, between or around forward passes.
    """

    def __init__(self, config: RouteLogConfig, runner: Any) -> None:
        self._config = config
        self._runner = runner
        vllm_config: VllmConfig = runner.vllm_config
        compilation = vllm_config.compilation_config
        modules = {
            name: compilation.static_forward_context[name]
            for name in compilation.static_all_moe_layers
        }
        support.check_supported(vllm_config, runner.device.type, modules.values())
        stages = _gather_over_stages(layers.describe(modules.items()))
        found = [item for stage in stages for item in stage]
        if not found:
            raise RouteLogError(
                f"VLLM_LOG_MOE is set but {vllm_config.model_config.model} has no MoE layer; "
                "unset VLLM_LOG_MOE"
            )
        chosen = layers.select(config.layers, found)
        stage = get_pp_group().rank_in_group
        #: Only tensor-parallel rank 0 writes: the others compute the same choices.
        writes = get_tp_group().rank_in_group == 0
        self._layers = [item for item in chosen if writes and item in stages[stage]]
        #: Stages that write, in order; the first one of data-parallel rank 0 owns the main file.
        self._writers = [i for i, own in enumerate(stages) if any(item in own for item in chosen)]
        self._step_id = 0
        self._finished: list[str] = []
        self._new: set[str] = set()
        self._known: set[str] = set()
        #: Of the recording that runs, or of the last one.
        self._session: Session | None = None
        self._writer: Writer | None = None
        self._recording = False
        self._in_pass = False
        if not self._layers:
            return
        self._header = provenance.header(
            vllm_config, runner.device, self._layers, len(found), self._rank()
        )
        # A pass is padded up to a multiple of the tensor-parallel size where it is split by it.
        num_rows = round_up(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.parallel_config.tensor_parallel_size,
        )
        self._buffer = capture.allocate(self._layers, num_rows, runner.device)
        self._snapshotter = SNAPSHOTTERS[runner.device.type]()
        layout = _layout(vllm_config)
        for slot, item in enumerate(self._layers):
            module = modules[item.name]
            logical_ids = LogicalIds() if vllm_config.parallel_config.enable_eplb else None
            if logical_ids is not None:
                module.router.moe_logical_ids = logical_ids
            module.moe_route_tap = Tap(
                self._buffer.ids, self._buffer.weights, slot, layout, logical_ids
            )
        logger.info(
            "Recording of MoE routes is armed: %d of %d MoE layers, %.1f MiB buffer",
            len(self._layers),
            len(found),
            self._buffer.nbytes / 2**20,
        )
        if config.autostart:
            self.start()

    # ---- around a forward pass -------------------------------------------------------------

    def begin_step(self, scheduler_output: Any) -> None:
        """Note what a step starts and ends. Also called for steps without a forward pass."""
        if not self._recording or self._session is None:
            return
        # Still set where the pass before raised an error: what it routed is nowhere.
        self._session.passes_unfinished += self._in_pass
        num_rows = scheduler_output.total_num_scheduled_tokens
        self._in_pass = num_rows > 0
        # Warm-up passes, padding and older passes left rows there, which a layer that does not
        # fire would repeat.
        self._buffer.clear(num_rows)
        self._finished.extend(scheduler_output.finished_req_ids)
        self._known.difference_update(scheduler_output.finished_req_ids)
        self._new = {item.req_id for item in scheduler_output.scheduled_new_reqs}

    def end_step(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        """Snapshot the forward pass that just ran.

        Args:
            num_scheduled_tokens: [R] rows of every request, in batch order.
        """
        if not self._recording or self._writer is None:
            return
        try:
            self._writer.put(self._take(num_scheduled_tokens))
        except Exception as error:  # whatever it is, the engine must go on
            self._writer.fail(error)
        self._in_pass = False

    def _take(self, num_scheduled_tokens: npt.NDArray[Any]) -> Step:
        """Everything of the step that the writer needs, copied."""
        batch = self._runner.input_batch
        num_reqs = len(num_scheduled_tokens)
        runs_ahead = self._runner.use_async_scheduling
        step = Step(
            forward_pass_id=self._step_id,
            req_ids=batch.req_ids.copy(),
            num_scheduled_tokens=num_scheduled_tokens.copy(),
            num_computed_tokens=batch.num_computed_tokens_cpu[:num_reqs].copy(),
            num_prompt_tokens=batch.num_prompt_tokens[:num_reqs].copy(),
            new_requests=self._new,
            stop_rules=self._stop_rules(batch.req_ids) if runs_ahead else {},
            finished=self._finished,
            pending=self._snapshotter.take(
                self._buffer,
                int(num_scheduled_tokens.sum()),
                self._runner.input_ids.gpu if runs_ahead else None,
            ),
        )
        self._finished = []
        self._step_id += 1
        return step

    def _stop_rules(self, req_ids: list[str]) -> dict[str, StopRule]:
        """Rules of the requests that this recording sees for the first time."""
        first_seen = [raw_id for raw_id in req_ids if raw_id not in self._known]
        self._known.update(first_seen)
        requests = self._runner.requests
        rules = {raw_id: _stop_rule(requests[raw_id].sampling_params) for raw_id in first_seen}
        return {raw_id: rule for raw_id, rule in rules.items() if rule is not None}

    # ---- control ---------------------------------------------------------------------------

    def control(self, command: str = "status", *rest: Any, **options: Any) -> dict[str, Any]:
        """Run a command. Never raises: an exception would leave other ranks' replies queued.

        Args:
            command: "start", "stop" or "status".
            rest: nothing; more than a command is answered with an error.
            options: ``path`` of "start", another file than VLLM_LOG_MOE's.
        """
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "start": self.start,
            "stop": self.stop,
            "status": self.status,
        }
        try:
            if rest or command not in commands:
                given = ", ".join(repr(item) for item in (command, *rest))
                raise RouteLogError(f"unknown command {given}; use {', '.join(commands)}")
            return {"ok": True, **commands[command](**options)}
        except Exception as error:
            if not isinstance(error, RouteLogError):
                logger.exception("moe_routes %s failed", command)
            message = str(error) or type(error).__name__
            return {"ok": False, "error": message, "rank": self._rank()}

    def start(self, path: str | None = None) -> dict[str, Any]:
        """Start a recording into a new file, from the next forward pass on."""
        if self._recording:
            raise RouteLogError("recording already runs; stop it first")
        if self._layers:
            main = log_path(path) if path else self._config.path
            rank = self._rank()
            names = [
                _rank_path(main, dp, stage, self._writers).name
                for dp in range(self._runner.vllm_config.parallel_config.data_parallel_size)
                for stage in self._writers
            ]
            session = Session(
                _rank_path(main, rank["dp"], rank["pp"], self._writers),
                {**self._header, "files": names},
                self._layers,
                self._buffer.not_an_id,
                self._config.weights,
            )
            self._step_id, self._finished, self._new, self._known = 0, [], set(), set()
            self._writer = Writer(
                session,
                self._config.queue_bytes,
                self._config.on_full,
                max(self._config.flush_seconds, formats.shortest_flush(main)),
            )
            self._session, self._recording = session, True
            # An engine in the user's own process is never told to shut its worker down.
            atexit.register(self.shutdown)
        return self.status()

    def stop(self, reason: str = "stop", timeout: float = STOP_SECONDS) -> dict[str, Any]:
        """Stop recording: everything waiting is written, then the end record."""
        if self._layers:
            if not self._recording or self._writer is None or self._session is None:
                raise RouteLogError("no recording runs; start one first")
            self._recording = False
            self._session.passes_unfinished += self._in_pass
            self._in_pass = False
            atexit.unregister(self.shutdown)
            if self._finished:
                self._writer.put(_only_finished(self._finished))
            self._writer.close(reason, timeout)
        return self.status()

    def status(self) -> dict[str, Any]:
        """The truth about this rank, now."""
        status: dict[str, Any] = {
            "rank": self._rank(),
            "writes": bool(self._layers),
            "recording": self._recording,
        }
        if self._session is not None and self._writer is not None:
            status["path"] = str(self._session.path)
            status["since"] = self._session.started
            status["so_far"] = self._session.totals()
            status["waiting_bytes"] = self._writer.waiting_bytes
            status["end"] = self._session.end
            status["error"] = self._writer.error
        return status

    def shutdown(self) -> None:
        """Close what is open when the worker goes down."""
        if not self._recording:
            return
        result = self.control("stop", reason="shutdown", timeout=SHUTDOWN_SECONDS)
        if not result["ok"]:
            logger.error("MoE route log: %s", result["error"])

    def _rank(self) -> dict[str, int]:
        return {
            "dp": self._runner.vllm_config.parallel_config.data_parallel_rank,
            "pp": get_pp_group().rank_in_group,
            "tp": get_tp_group().rank_in_group,
        }


def _gather_over_stages(own: list[layers.MoELayer]) -> list[list[layers.MoELayer]]:
    """The MoE layers of every pipeline stage. Every rank calls it."""
    group = get_pp_group()
    if group.world_size == 1:
        return [own]
    stages: list[list[layers.MoELayer]] = [[] for _ in range(group.world_size)]
    torch.distributed.all_gather_object(stages, own, group=group.cpu_group)
    return stages


def _layout(config: VllmConfig) -> Layout | None:
    """Where the layers' rows belong; None where they are the pass's rows as they are."""
    parallel = config.parallel_config
    if parallel.data_parallel_size == 1:
        return None
    return Layout(parallel.data_parallel_rank)


def _rank_path(main: Path, dp: int, stage: int, writers: list[int]) -> Path:
    """A rank's file: ``x.jsonl``, or ``x.dp1.jsonl``, ``x.pp1.jsonl``, ``x.dp1.pp1.jsonl``.

    The first data-parallel rank and the first writing stage go without a part of the name.
    """
    parts = [f".dp{dp}"] if dp else []
    parts += [f".pp{stage}"] if stage != writers[0] else []
    return main.with_name(f"{main.stem}{''.join(parts)}{main.suffix}")


def _stop_rule(params: Any) -> StopRule | None:
    """What ends a request that samples with ``params`` (a ``SamplingParams`` or None)."""
    if params is None:
        return None
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    return StopRule(frozenset(stops or ()), params.min_tokens)


def _only_finished(finished: list[str]) -> Step:
    """A step without a forward pass, to end requests."""
    none = np.zeros(0, dtype=np.int32)
    return Step(-1, [], none, none, none, (), {}, finished, None)
