# SPDX-License-Identifier: Apache-2.0
"""vLLM's offline engine with the recorder armed, and its chatter kept off the terminal."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from expert_profiler.errors import UserError
from expert_profiler.run.timing import Repeat

_REFUSAL = re.compile(r"RouteLogError: (.+)")
_REASON = re.compile(r"(?:ValueError|ValidationError|OutOfMemoryError|RuntimeError|OSError): (.+)")


@contextlib.contextmanager
def quiet(log: Path, verbose: bool) -> Iterator[IO[str]]:
    """Send everything that this process and its children print to ``log``.

    Args:
        log: file for the chatter.
        verbose: leave it on the terminal instead.

    Yields:
        the terminal's stderr, for progress.
    """
    if verbose:
        yield sys.stderr
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in enumerate(saved, start=1):
            os.dup2(copy, fd)
            os.close(copy)
        terminal.close()


def reason_in(log: Path) -> str | None:
    """What stopped an engine, from its log: the recorder's refusal, else the first error."""
    if not log.is_file():
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    found = _REFUSAL.search(text) or _REASON.search(text)
    return found[1] if found else None


def start(arguments: Mapping[str, Any], log: Path) -> Any:
    """Start a ``vllm.LLM``.

    Args:
        arguments: of ``vllm.LLM``.
        log: where its chatter goes, to quote from when it does not start.

    Raises:
        UserError: it did not start.
    """
    from vllm.entrypoints.llm import LLM

    try:
        return LLM(**arguments)
    except Exception as error:
        reason = reason_in(log) or f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"the engine did not start with {arguments['model']}: {reason}; "
            "run again with --verbose for vLLM's own messages"
        ) from error


def stop(llm: Any) -> None:
    """Shut the engine's processes down now, rather than when Python gets to it."""
    llm.llm_engine.engine_core.shutdown()


def command(llm: Any, name: str, **options: Any) -> list[dict[str, Any]]:
    """Send a command to the recorder of every worker.

    Raises:
        UserError: a worker answered with an error.
    """
    replies: list[dict[str, Any]] = llm.collective_rpc("moe_routes", args=(name,), kwargs=options)
    for reply in replies:
        if not reply["ok"]:
            raise UserError(f"recorder: {reply['error']}")
    return replies


def timed_pass(
    llm: Any, prompts: Sequence[str], sampling: Any, record_to: Path | None
) -> tuple[Repeat, list[Any], list[dict[str, Any]]]:
    """Generate once over all prompts.

    With ``record_to`` the wall time includes starting the recording and closing its file, so that
    no part of its cost is left out.

    Returns:
        the timing, vLLM's outputs and the end records of the ranks that wrote.
    """
    started = time.perf_counter()
    if record_to is not None:
        command(llm, "start", path=str(record_to))
    outputs = llm.generate(list(prompts), sampling, use_tqdm=False)
    replies = [] if record_to is None else command(llm, "stop")
    seconds = time.perf_counter() - started
    tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    return Repeat(seconds, tokens), outputs, [item["end"] for item in replies if item["writes"]]
