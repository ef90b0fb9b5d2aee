# SPDX-License-Identifier: Apache-2.0
"""One recorder a worker: armed when the model is loaded, started and stopped at step boundaries."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.moe_routes import config as config_module
from vllm.moe_routes import layers
from vllm.moe_routes.capture.buffer import allocate
from vllm.moe_routes.capture.pass_timer import CLOCKS
from vllm.moe_routes.capture.references import References
from vllm.moe_routes.capture.snapshot import SNAPSHOTTERS
from vllm.moe_routes.capture.taps import LogicalIds, Tap
from vllm.moe_routes.config import RouteLogConfig
from vllm.moe_routes.errors import ConflictError, RouteLogError
from vllm.moe_routes.recording import process_exit, provenance, refusals
from vllm.moe_routes.recording.base import Recording, Source
from vllm.moe_routes.recording.per_pass import PassRecording
from vllm.moe_routes.recording.per_token import TokenRecording
from vllm.moe_routes.recording.rank_files import Rank, main_path, rank_files
from vllm.moe_routes.recording.stat import StatRecording
from vllm.moe_routes.schema import Record
from vllm.utils.math_utils import round_up

logger = init_logger(__name__)

COMMANDS = ("configure", "start", "stop", "reset", "dump", "status")
#: Closing must fit into the five seconds that vLLM gives a worker to shut down.
SHUTDOWN_SECONDS = 4.0
STOP_SECONDS = 300.0
#: How long a worker that got SIGTERM has to close its recording in the ordinary way. vLLM sends it
#: as late as a second before SIGKILL.
SIGNAL_SECONDS = 0.3


def attach(runner: Any) -> "Recorder | None":
    """Arm recording on a loaded model, before it is compiled. None while the switch is unset.

    Args:
        runner: the ``GPUModelRunner`` (or ``CPUModelRunner``) that holds the model.

    Raises:
        RouteLogError: the switches, the model or the engine's mode don't allow it.
    """
    config = RouteLogConfig.from_env()
    return None if config is None else Recorder(config, runner)


def control(worker: Any, *command: Any, **options: Any) -> dict[str, Any]:
    """What ``collective_rpc("moe_routes", (command,), options)`` reaches on a worker."""
    recorder: Recorder | None = getattr(worker.model_runner, "moe_routes", None)
    if recorder is None:
        return {
            "ok": False,
            "error": "recording is off in this engine; start it with VLLM_LOG_MOE or "
            "VLLM_LOG_MOE_API=1",
        }
    return recorder.control(*command, **options)


def shutdown(worker: Any) -> None:
    """Close what is open when ``worker`` goes down, however far it had come up."""
    recorder = getattr(getattr(worker, "model_runner", None), "moe_routes", None)
    if recorder is not None:
        recorder.shutdown()


class Recorder:
    """Turns real forward passes of one worker into recordings, one after another.

    Every method runs on the worker's engine thread, between or around forward passes.
    """

    def __init__(self, config: RouteLogConfig, runner: Any) -> None:
        self._config = config
        self._vllm_config: VllmConfig = runner.vllm_config
        compilation = self._vllm_config.compilation_config
        modules = {
            name: compilation.static_forward_context[name]
            for name in compilation.static_all_moe_layers
        }
        refusals.check_supported(self._vllm_config, runner.device.type, modules.values())
        self._stages = _gather_over_stages(layers.describe(modules.items()))
        found = [item for stage in self._stages for item in stage]
        if not found:
            raise RouteLogError(
                f"VLLM_LOG_MOE is set but {self._vllm_config.model_config.model} has no MoE layer; "
                "unset VLLM_LOG_MOE and VLLM_LOG_MOE_API"
            )
        self._armed = layers.select(config.layers, found)
        parallel = self._vllm_config.parallel_config
        #: Read once: the groups are gone before the last command comes.
        self._rank = Rank(
            dp=parallel.data_parallel_rank,
            pp=get_pp_group().rank_in_group,
            tp=get_tp_group().rank_in_group,
        )
        #: This worker among all workers of all data-parallel ranks.
        self._global_rank = int(
            (self._rank.dp * parallel.pipeline_parallel_size + self._rank.pp)
            * parallel.tensor_parallel_size
            + self._rank.tp
        )
        #: Only tensor-parallel rank 0 records: the others compute the same choices.
        records = self._rank.tp == 0
        own = self._stages[self._rank.pp]
        #: In slot order.
        self._layers = [item for item in self._armed if records and item in own]
        self._mode = config.mode
        self._selection = "all"
        self._path: str | None = None
        #: The recording that runs, or the last one.
        self._recording: Recording | None = None
        #: One that was reset away and is still being written.
        self._previous: Recording | None = None
        self._active = False
        #: Takes back what is called when the process ends, where something is.
        self._cancel_exit: Callable[[], None] | None = None
        #: When a shutdown that has begun must be over.
        self._deadline: float | None = None
        #: Whether the last recording ended at its bound and nobody has stopped it since.
        self._ended_itself = False
        self._header: Record = {}
        #: Modules and their taps, in slot order.
        self._taps: list[tuple[Any, Tap]] = []
        self._taps_stay = False
        if self._layers:
            self._arm(runner, modules, len(found))
            process_exit.watch(self._close_after_signal)
        if config.autostart and config.path is not None:
            self.start()

    def _arm(self, runner: Any, modules: Mapping[str, Any], num_moe_layers: int) -> None:
        """Allocate the capture buffer, and have the layers write to it where graphs are made."""
        config, parallel = self._vllm_config, self._vllm_config.parallel_config
        self._header = provenance.header(
            config, runner.device, self._layers, num_moe_layers, self._rank._asdict()
        )
        # Without graphs, which bake the hook in, the layers of a running recording are tapped and
        # no others; and on the host the hook keeps references, and writes to no buffer.
        self._taps_stay = provenance.execution(config) != "eager"
        no_buffer = not self._taps_stay and runner.device.type == "cpu"
        references: References | None = {} if no_buffer else None
        # A pass is padded up to a multiple of the tensor-parallel size where it is split by it.
        num_rows = round_up(
            config.scheduler_config.max_num_batched_tokens, parallel.tensor_parallel_size
        )
        buffer = allocate(self._layers, 0 if no_buffer else num_rows, runner.device)
        self._source = Source(
            runner,
            buffer,
            SNAPSHOTTERS[runner.device.type](),
            CLOCKS[runner.device.type](),
            self._config,
            self._global_rank,
            references,
        )
        dp_rank = self._rank.dp if parallel.data_parallel_size > 1 else None
        for slot, item in enumerate(self._layers):
            module = modules[item.name]
            logical_ids = LogicalIds() if parallel.enable_eplb else None
            if logical_ids is not None:
                module.router.moe_logical_ids = logical_ids
            tap = Tap(buffer.ids, buffer.weights, slot, dp_rank, logical_ids, references)
            self._taps.append((module, tap))
        if self._taps_stay:
            self._tap(self._layers)
        logger.info(
            "Recording of MoE routes is armed: %d of %d MoE layers, %s",
            len(self._layers),
            num_moe_layers,
            "no buffer" if no_buffer else f"{buffer.nbytes / 2**20:.1f} MiB buffer",
        )

    # ---- around a forward pass -------------------------------------------------------------

    def begin_step(self, scheduler_output: Any) -> None:
        """Note what a step starts and ends. Also called for steps without a forward pass."""
        if self._active and self._recording is not None:
            if self._recording.over:
                self._end_by_itself()
            else:
                self._recording.begin(scheduler_output)
        elif self._cancel_exit is not None:  # the last one ended without anybody waiting for it
            self._drop_exit_call()

    def end_step(self, num_scheduled_tokens: npt.NDArray[Any]) -> None:
        """Take the forward pass that just ran.

        Args:
            num_scheduled_tokens: [R] rows of every request, in batch order.
        """
        if self._active and self._recording is not None:
            self._recording.end(num_scheduled_tokens)

    # ---- control ---------------------------------------------------------------------------

    def control(self, command: str = "status", *rest: Any, **options: Any) -> dict[str, Any]:
        """Run a command. Never raises: an exception would leave other ranks' replies queued.

        Args:
            command: one of ``COMMANDS``, each a method.
            rest: nothing; more than a command is answered with an error.
            options: those of the method.
        """
        try:
            if rest or command not in COMMANDS:
                given = ", ".join(repr(item) for item in (command, *rest))
                raise RouteLogError(f"unknown command {given}; use {', '.join(COMMANDS)}")
            return {"ok": True, **getattr(self, command)(**options)}
        except Exception as error:
            if not isinstance(error, RouteLogError):
                logger.exception("moe_routes %s failed", command)
            return {
                "ok": False,
                "error": str(error) or type(error).__name__,
                "conflict": isinstance(error, ConflictError),
                "rank": self._rank._asdict(),
            }

    def configure(
        self, mode: str | None = None, layers: str | None = None, path: str | None = None
    ) -> dict[str, Any]:
        """Choose what the next recording is.

        Args:
            mode: one of ``config.MODES``; None keeps it.
            layers: a selection among the armed layers; None keeps it.
            path: file of the next recording, as ``start`` takes it; None forgets it.
        """
        if self._active:
            raise ConflictError("a recording runs; stop it before configuring the next one")
        mode = self._mode if mode is None else config_module.check_mode(mode)
        selection = self._selection if layers is None else layers
        self._select(selection)
        if path is not None:
            config_module.log_path(path, mode=mode)
        self._mode, self._selection, self._path = mode, selection, path
        return self.status()

    def start(self, path: str | None = None) -> dict[str, Any]:
        """Start a recording from the next forward pass on, in the configured mode.

        Args:
            path: file to create; None takes the one of ``configure`` or of VLLM_LOG_MOE. The mode
                ``stat`` writes none.
        """
        if self._active:
            raise ConflictError("recording already runs; stop it first")
        self._require_closed()
        self._feed(self._make(path))
        return self.status()

    def stop(self, reason: str = "stop", timeout: float = STOP_SECONDS) -> dict[str, Any]:
        """Stop recording: everything waiting is written, then the end record.

        Args:
            reason: for the end record.
            timeout: seconds to wait for that; 0 does not wait, and ``status`` tells.
        """
        if not self._active:
            if self._ended_itself:  # nothing is left to do for who did not know
                self._ended_itself = False
                self._drop_exit_call()
                return self.status()
            raise ConflictError("no recording runs; start one first")
        self._stop(reason, timeout)
        return self.status()

    def reset(self, path: str | None = None) -> dict[str, Any]:
        """Go on from zero at this step boundary: what was recorded ends here, or is forgotten.

        Args:
            path: file of what follows, where a recording with a file runs.
        """
        self._require_closed()
        if not self._active:
            if self._recording is None and self._layers:
                raise ConflictError("there is nothing to reset: nothing was recorded yet")
            self._recording = None
            self._drop_exit_call()
            return self.status()
        fresh = self._make(path)  # where it can't be made, the old one goes on
        if self._recording is not None:
            self._recording.stop("reset", 0)
        self._previous = self._recording
        self._feed(fresh)
        return self.status()

    def dump(self, max_records: int = 0) -> dict[str, Any]:
        """Everything counted so far, without changing it; see ``Recording.dump``."""
        if self._recording is None:
            return self.status()
        return {**self.status(), **self._recording.dump(max_records)}

    def status(self) -> dict[str, Any]:
        """The truth about this rank, now."""
        chosen = self._chosen()
        status: dict[str, Any] = {
            "rank": self._rank._asdict(),
            "global_rank": self._global_rank,
            "model": self._served_name(),
            "writes": bool(chosen),
            "mode": self._mode,
            "layers": self._selection,
            "next_path": self._path,
            "recording": self._active and not (self._recording and self._recording.over),
            "closing": self._is_closing(),
            "directory": str(self._config.directory),
        }
        if self._recording is not None:
            status.update(self._recording.status())
        return status

    def shutdown(self) -> None:
        """Close what is open when the worker goes down. Raises nothing of its own.

        vLLM's signal handler raises ``SystemExit`` wherever the thread is, in the midst of this
        too: a second call, at the end of the process, goes on where the first broke off.
        """
        if self._active or self._is_closing():
            # One for both calls: vLLM kills a worker that takes longer.
            self._deadline = self._deadline or time.monotonic() + SHUTDOWN_SECONDS
            self._stop_in_time(self._stop)
            if self._previous is not None:
                self._stop_in_time(self._previous.stop)
        self._drop_exit_call()

    def _end_by_itself(self) -> None:
        """The recording is over, at its bound or by a signal: this pass is not part of it."""
        result = self.control("stop", reason="over", timeout=0)
        self._ended_itself = True
        logger.info("MoE route log %s has ended; generation goes on", result.get("path"))

    def _close_after_signal(self) -> None:
        """Close what the engine's thread, which may be stuck, does not. Runs on one of its own."""
        recording = self._recording
        deadline = time.monotonic() + SIGNAL_SECONDS
        while self._active and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._active and recording is not None and recording is self._recording:
            logger.warning("This worker got SIGTERM and does not end: its MoE route log is closed")
            recording.close_early("shutdown")

    # ---- inside ----------------------------------------------------------------------------

    def _stop(self, reason: str, timeout: float) -> None:
        self._active = False
        try:
            if self._recording is not None:
                if not self._taps_stay:
                    self._tap([])
                self._recording.stop(reason, timeout)
        finally:
            self._drop_exit_call()

    def _stop_in_time(self, stop: Callable[[str, float], None]) -> None:
        """``stop`` within what is left of a shutdown's time; an error is logged, not raised."""
        left = (self._deadline or 0.0) - time.monotonic()
        try:
            stop("shutdown", max(left, 0.01))  # 0 would not wait, and not say so
        except Exception as error:
            expected = isinstance(error, RouteLogError)
            logger.error("MoE route log: %s", error, exc_info=not expected)

    def _drop_exit_call(self) -> None:
        """Take back what is called at the end of the process, where nothing is left to close.

        It holds this recorder, and with it the model.
        """
        if self._cancel_exit is not None and not self._active and not self._is_closing():
            self._cancel_exit()
            self._cancel_exit = None

    def _make(self, path: str | None) -> Recording | None:
        """The recording that the configuration asks for; None where another rank records."""
        chosen = self._chosen()
        if not chosen:
            return None
        slots = [self._layers.index(item) for item in chosen]
        config_module.check_sample(self._config.sample, self._mode)
        if self._mode == "stat":
            if path is not None:
                raise RouteLogError(f"mode stat keeps counts and writes no file; drop {path}")
            return StatRecording(self._source, chosen, slots)
        main = main_path(path or self._path, self._config.path, self._mode)
        num_dp_ranks = self._vllm_config.parallel_config.data_parallel_size
        wanted = self._select(self._selection)
        file, names = rank_files(main, self._rank, num_dp_ranks, self._stages, wanted)
        header = {
            **self._header,
            **provenance.layer_facts(chosen),
            "files": names,
            **provenance.limit_facts(self._config),
        }
        make = PassRecording if self._mode == "per_pass" else TokenRecording
        return make(self._source, chosen, slots, file, header)

    def _feed(self, recording: Recording | None) -> None:
        """Feed ``recording`` from the next forward pass on."""
        self._recording, self._active, self._ended_itself = recording, True, False
        self._deadline = None
        if recording is not None:
            # An engine in the user's own process is never told to shut its worker down.
            self._cancel_exit = self._cancel_exit or process_exit.at_exit(self.shutdown)
            if not self._taps_stay:
                self._tap(recording.layers)

    def _tap(self, chosen: Sequence[layers.MoELayer]) -> None:
        """Let these layers' choices be captured, and no others'."""
        for item, (module, tap) in zip(self._layers, self._taps, strict=True):
            module.moe_route_tap = tap if item in chosen else None

    def _select(self, selection: str) -> list[layers.MoELayer]:
        """The layers of the whole model that a selection names, among the armed ones."""
        return layers.select(selection, self._armed, "layers=")

    def _chosen(self) -> list[layers.MoELayer]:
        """This rank's layers of the next recording, in slot order."""
        wanted = self._select(self._selection)
        return [item for item in self._layers if item in wanted]

    def _is_closing(self) -> bool:
        recordings = [self._previous] if self._active else [self._previous, self._recording]
        return any(item is not None and not item.closed for item in recordings)

    def _require_closed(self) -> None:
        if self._is_closing():
            raise ConflictError(
                "the recording before is still being written; look at the status and try again"
            )
        self._previous = None

    def _served_name(self) -> str:
        """The model as clients know it: its path is nothing to them."""
        names = self._vllm_config.model_config.served_model_name
        return str(names[0] if isinstance(names, list) else names)


def _gather_over_stages(own: list[layers.MoELayer]) -> list[list[layers.MoELayer]]:
    """The MoE layers of every pipeline stage. Every rank calls it."""
    group = get_pp_group()
    if group.world_size == 1:
        return [own]
    stages: list[list[layers.MoELayer]] = [[] for _ in range(group.world_size)]
    torch.distributed.all_gather_object(stages, own, group=group.cpu_group)
    return stages
