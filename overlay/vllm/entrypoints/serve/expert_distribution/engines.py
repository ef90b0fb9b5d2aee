# SPDX-License-Identifier: Apache-2.0
"""Commands to the recorder of every worker of every engine, in bounded time."""

import asyncio
from typing import Any

from vllm.entrypoints.serve.expert_distribution.guard import ApiError
from vllm.v1.engine.exceptions import EngineDeadError

#: A command runs between two forward passes; no pass takes this long.
COMMAND_SECONDS = 30.0
#: How long an answer waits for files to be written to their end.
CLOSE_SECONDS = 10.0
#: Requests that may wait for their turn; more are sent away.
MOST_WAITING = 32

Reply = dict[str, Any]


class Engines:
    """All engines of a server. One command runs at a time.

    Args:
        client: vLLM's engine client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def __aenter__(self) -> "Engines":
        if self._waiting >= MOST_WAITING:
            raise ApiError(503, f"{self._waiting} requests wait for the recorder; try again later")
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._turn.release()

    async def command(self, name: str, **options: Any) -> list[Reply]:
        """Run a command of ``Recorder.control`` on every worker.

        Within an engine all workers run it between the same two forward passes.

        Returns:
            The workers' answers, engine by engine and by rank.

        Raises:
            ApiError: an engine is dead, or did not answer in time.
        """
        core = self._client.engine_core
        calls = [
            # collective_rpc of the client itself returns the first engine's answers only.
            core._call_utility_async(
                "collective_rpc", "moe_routes", None, (name,), options, engine=engine
            )
            for engine in core.core_engines
        ]
        everything = asyncio.ensure_future(asyncio.gather(*calls))
        try:
            # Not cancelled when it takes too long: the workers will still answer.
            replies = await asyncio.wait_for(asyncio.shield(everything), COMMAND_SECONDS)
        except asyncio.TimeoutError:
            everything.add_done_callback(lambda future: future.exception())
            raise ApiError(
                504,
                f"the engine did not answer within {COMMAND_SECONDS:g} s; the command may still "
                "run, look at GET /expert_distribution_status",
            ) from None
        except EngineDeadError:
            raise ApiError(503, "the engine is dead; the server's log has the reason") from None
        return [reply for engine in replies for reply in engine]

    async def agreed(self, name: str, **options: Any) -> list[Reply]:
        """Run a command that every worker has to carry out.

        Raises:
            ApiError: one did not; 409 where the command does not fit the recorder's state.
        """
        replies = await self.command(name, **options)
        if refused := refusal(replies):
            raise refused
        return replies

    async def written(self) -> list[Reply]:
        """Wait until nothing waits to be written, but not for long; the workers' status then."""
        deadline = asyncio.get_running_loop().time() + CLOSE_SECONDS
        pause = 0.02
        while True:
            replies = await self.agreed("status")
            busy = any(r["closing"] or r.get("waiting_passes") for r in replies)
            if not busy or asyncio.get_running_loop().time() > deadline:
                return replies
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 1.5)


def refusal(replies: list[Reply]) -> ApiError | None:
    """The error that stands for those of several workers; None where all carried it out."""
    failed = [reply for reply in replies if not reply["ok"]]
    if not failed:
        return None
    conflict = all(reply.get("conflict") for reply in failed)
    first = failed[0]["error"]
    every = len(failed) == len(replies)
    some = "" if every else f" ({len(failed)} of {len(replies)} workers said so)"
    return ApiError(409 if conflict else 503, f"{first}{some}")


def engines_of(state: Any) -> Engines:
    """The engines of an application's state; made when there is an event loop."""
    if not hasattr(state, "moe_routes_engines"):
        state.moe_routes_engines = Engines(state.engine_client)
    engines: Engines = state.moe_routes_engines
    return engines
