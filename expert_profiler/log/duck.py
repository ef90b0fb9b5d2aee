# SPDX-License-Identifier: Apache-2.0
"""DuckDB as this project opens it: bounded memory, progress, and errors in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from expert_profiler.errors import UserError
from expert_profiler.log.line_file import raise_bad_line
from expert_profiler.log.log_file import RECORD_AGAIN, LogFile

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "1GB"


def connect(scratch: str) -> duckdb.DuckDBPyConnection:
    """A database in memory that spills to the folder ``scratch`` above ``MEMORY_LIMIT``."""
    import duckdb  # 100 ms, which a Parquet log's histogram does without

    db = duckdb.connect(config={"memory_limit": MEMORY_LIMIT, "temp_directory": scratch})
    db.execute("SET enable_progress_bar = true")
    db.execute("SET enable_progress_bar_print = false")
    return db


@contextmanager
def watching(
    db: duckdb.DuckDBPyConnection, on_progress: Callable[[float], None] | None
) -> Iterator[None]:
    """Report the running query's percentage from a second thread."""
    if on_progress is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            on_progress(min(99.0, max(0.0, db.query_progress())))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        on_progress(100.0)


@contextmanager
def errors_named(files: Sequence[LogFile]) -> Iterator[None]:
    """Turn an error of DuckDB into one line that names the file, and the malformed line if any."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        fact = str(error).splitlines()[0]
        raise UserError(
            f"{files[0].path}: {fact}; free disk space or set TMPDIR to a larger disk"
        ) from None
    except (duckdb.Error, UnicodeDecodeError) as error:
        raise_bad_line(files)
        fact = str(error).splitlines()[0]
        if isinstance(error, UnicodeDecodeError):  # DuckDB's own message is cut inside a character
            fact = "DuckDB refuses a line, and what it says of it is no text"
        raise UserError(f"{files[0].path}: {fact}; {RECORD_AGAIN}") from None
