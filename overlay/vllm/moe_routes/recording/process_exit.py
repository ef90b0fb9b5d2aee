# SPDX-License-Identifier: Apache-2.0
"""Run cleanup when a process that records exits or gets SIGTERM.

Python runs signal handlers on the main thread, between two of its instructions. A worker that waits
in a collective for a rank that has gone already never gets there: vLLM's SIGTERM stays without
effect, and SIGKILL follows. The interpreter's wake-up descriptor is written to at once.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def at_exit(call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` when this process ends, unless it is killed.

    A forked worker leaves by ``os._exit`` and never comes to ``atexit``; ``multiprocessing`` has
    its own list, and goes through it after the ``SystemExit`` of a signal handler, too.

    Returns:
        What takes it back.
    """
    if multiprocessing.parent_process() is None:
        atexit.register(call)
        return partial(atexit.unregister, call)
    return Finalize(None, call, exitpriority=0).cancel


def watch(on_signal: Callable[[], None]) -> None:
    """Call ``on_signal`` on a thread of its own when this process gets SIGTERM or SIGINT.

    Handlers stay as they are. Only in processes that vLLM started: a user's own process keeps its
    wake-up descriptor, which asyncio may want, and is not killed seconds later.
    """
    is_child = multiprocessing.parent_process() is not None
    if not is_child or threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:  # somebody else's
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        return
    arguments = (reader, on_signal)
    threading.Thread(target=_run, args=arguments, name="moe-routes-exit", daemon=True).start()


def _run(reader: int, on_signal: Callable[[], None]) -> None:
    while numbers := os.read(reader, 64):
        if _SIGNALS.intersection(numbers):
            on_signal()
