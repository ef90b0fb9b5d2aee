# SPDX-License-Identifier: Apache-2.0
"""A file of lines that knows its durable contents: to the line, and after an error too."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vllm.moe_routes.errors import ConflictError, RouteLogError
from vllm.moe_routes.schema import REQUEST, ROUTE

#: Bytes that wait before they are handed to the operating system without a flush.
BUFFER_BYTES = 1 << 20
#: How a line with one row begins, and a request's; and the mark of a row with a flag.
_ROUTE, _REQUEST = (f'{{"type":"{kind}"'.encode() for kind in (ROUTE, REQUEST))
_FLAGGED = b',"flag":"'
#: No line of a log is longer than this; bounds what is read back to find where one begins.
_LONGEST_LINE = 1 << 20
#: Room made for an end record beyond its length, whose digits may change by making it.
_SPARE = 512


class Contents(NamedTuple):
    """What lines, or a file, hold: rows, those of them with a flag, and request records."""

    rows: int = 0
    flagged: int = 0
    requests: int = 0

    def plus(self, other: "Contents") -> "Contents":
        return Contents(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: "Contents") -> "Contents":
        return Contents(*(a - b for a, b in zip(self, other, strict=True)))


class _Chunk(NamedTuple):
    """Whole lines that wait. Of several lines each holds as many rows as any other."""

    data: bytes
    contents: Contents


class LineFile:
    """Creates a file, and appends whole lines to it.

    Args:
        path: file to create; never one that exists.
        private: readable by its owner only, whatever the umask.

    Raises:
        RouteLogError: it exists, or can't be created.
    """

    def __init__(self, path: Path, private: bool) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(path, flags, 0o600 if private else 0o666)
        except OSError as error:
            raise refusal(path, error) from None
        self._waiting: deque[_Chunk] = deque()
        self._waiting_bytes = 0
        #: Bytes of the first waiting chunk that are in the file already.
        self._begun = 0
        #: Bytes of the file's whole lines.
        self._good = 0
        self._header_bytes = 0
        #: What those lines hold.
        self.durable = Contents()
        #: Rows of the last lines that hold more than one row each.
        self._last_rows: deque[int] = deque(maxlen=4096)

    @property
    def size(self) -> int:
        """Size, of what waits too."""
        return max(0, self._good) + self._waiting_bytes

    def fileno(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "the file is closed")
        return self._fd

    def put(self, data: bytes, contents: Contents) -> None:
        """Add whole lines."""
        self._waiting.append(_Chunk(data, contents))
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system.

        Raises:
            OSError: some of it can't be written, or the file is no more what was written to it.
        """
        self._check_still_ours()  # before a write behind a cut end hides it
        while self._waiting:
            chunk = self._waiting[0]
            while self._begun < len(chunk.data):
                self._begun += self._write(chunk.data[self._begun :], self._good + self._begun)
            self._waiting.popleft()
            self._begun = 0
            self._waiting_bytes -= len(chunk.data)
            self._take_over(chunk.data, chunk.contents)
        self._check_still_ours()

    def seal_header(self) -> None:
        """What is in the file now is never given up to make room for an end."""
        self._header_bytes = self._good

    def cut_back(self) -> None:
        """After an error: keep the whole lines that are in the file, forget what waits."""
        if self._good >= 0:
            with contextlib.suppress(OSError):  # a healthy file, or one that is again
                self.flush()
        if self._waiting:
            chunk, begun = self._waiting[0], self._begun
            whole = chunk.data[: chunk.data.rfind(b"\n", 0, begun) + 1]
            self._take_over(whole, _share(chunk, whole))
        self._waiting.clear()
        self._waiting_bytes = self._begun = 0
        if self._good >= 0:
            with contextlib.suppress(OSError):  # then half a line stays, and readers say so
                os.ftruncate(self.fileno(), self._good)

    def end_with(self, make_line: Callable[[], bytes]) -> None:
        """Add a last line after an error, and close.

        Where the disk is full, the last lines make room for it: they are given up, and no longer
        :attr:`durable`.

        Args:
            make_line: the line, by what is durable then.

        Raises:
            OSError: it can't be written.
        """
        try:
            if self._good < 0:
                raise OSError(errno.ESTALE, "the file is not what was written to it")
            os.ftruncate(self.fileno(), self._good)
            line = make_line()
            try:
                self._write_line(line)
            except OSError:
                os.ftruncate(self.fileno(), self._good)
                self._give_up(len(line) + _SPARE)
                self._write_line(make_line())
        finally:
            self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def discard(self) -> None:
        """Close the file and remove it: nothing was recorded in it."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _check_still_ours(self) -> None:
        stat = os.fstat(self.fileno())
        if stat.st_nlink and stat.st_size == self._good + self._begun:
            return
        what = "was changed by somebody else" if stat.st_nlink else "was removed"
        self.durable = Contents()
        self._good = -1
        raise OSError(errno.ESTALE, f"the file {what} while it was written")

    def _write(self, data: bytes, offset: int) -> int:
        """One write; tests put a failing one in its place."""
        return os.pwrite(self.fileno(), data, offset)

    def _write_line(self, line: bytes) -> None:
        done = 0
        while done < len(line):
            done += self._write(line[done:], self._good + done)

    def _take_over(self, data: bytes, contents: Contents) -> None:
        self._good += len(data)
        self.durable = self.durable.plus(contents)
        if contents.rows and not data.startswith(_ROUTE):
            self._last_rows.append(contents.rows)

    def _give_up(self, size: int) -> None:
        """Cut at least ``size`` bytes of last lines off."""
        start = max(0, self._good - size - _LONGEST_LINE)
        tail = os.pread(self.fileno(), self._good - start, start)
        at = tail.rfind(b"\n", 0, max(0, len(tail) - size)) + 1
        if start + at < self._header_bytes or at == 0:
            raise OSError(errno.ENOSPC, "no room for an end record")
        lines = tail[at:].split(b"\n")[:-1]
        routes = sum(line.startswith(_ROUTE) for line in lines)
        flagged = sum(line.startswith(_ROUTE) and _FLAGGED in line for line in lines)
        requests = sum(line.startswith(_REQUEST) for line in lines)
        others = min(len(lines) - routes - requests, len(self._last_rows))
        rows = routes + sum(self._last_rows.pop() for _ in range(others))
        self._good = start + at
        self.durable = self.durable.minus(Contents(rows, flagged, requests))
        os.ftruncate(self.fileno(), self._good)


def _share(chunk: _Chunk, whole: bytes) -> Contents:
    """What some of a chunk's lines hold."""
    lines = whole.count(b"\n")
    each = chunk.contents.rows // max(1, chunk.data.count(b"\n"))
    requests = chunk.contents.requests if lines else 0
    return Contents(lines * each, whole.count(_FLAGGED) if chunk.contents.flagged else 0, requests)


def refusal(path: Path, error: OSError, kind: str = "file") -> RouteLogError:
    """What is said where a log can't be created; ``kind`` is "file" or "directory"."""
    if isinstance(error, FileExistsError):
        return ConflictError(
            f"route log {path} exists; move it away or set VLLM_LOG_MOE to another {kind}"
        )
    return RouteLogError(
        f"route log {path} can't be created ({error.strerror}); set VLLM_LOG_MOE to a {kind} in "
        "a writable directory"
    )
