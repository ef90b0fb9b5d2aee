# SPDX-License-Identifier: Apache-2.0
"""The one error a user is meant to read, and what turns it into a line and an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

#: The exit code of every command for what its user can mend.
EXIT_CODE = 2
#: Whether this is a checkout, where ./test.sh makes the environment, or an installed package.
IN_CHECKOUT = (Path(__file__).resolve().parents[1] / "test.sh").is_file()


class UserError(Exception):
    """A problem the user can fix: the fact, the place and the next command, in one line.

    What a file or a command line put into the message can't break the line or the terminal:
    characters that don't print are shown as Python would write them.
    """

    def __init__(self, message: str) -> None:
        shown = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(shown))


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """``parser.parse_args``, which lets a "--" too many through as an empty list of words."""
    args = parser.parse_args(argv)
    for action in parser._actions:
        if action.nargs in (None, "?") and isinstance(getattr(args, action.dest, None), list):
            parser.error(f"{action.dest} is missing: '--' is no name")
    return args


def positive(text: str) -> int:
    """The ``type`` of an option that counts something: 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(main: Callable[[], int]) -> int:
    """Call ``main`` and turn a :class:`UserError` or Ctrl-C into one line and an exit code."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except ModuleNotFoundError as error:
        print(
            f"error: package {error.name} is not installed for {sys.executable}; "
            f"{_remedy(error.name)}",
            file=sys.stderr,
        )
        return EXIT_CODE
    except BrokenPipeError:  # as in: … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # A disk without room, or a name that the system takes for none, such as a too long one.
        if error.filename is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there, or give another place" if full else "give another name"
        told = UserError(f"{str(error.filename)[:200]}: {error.strerror}; {remedy}")
        print(f"error: {told}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _remedy(package: str | None) -> str:
    """What brings a missing package, in a checkout or beside an installed wheel."""
    if IN_CHECKOUT:
        return "run with .venv/bin/python, which ./test.sh makes"
    if package in ("vllm", "torch"):
        return "run: pip install 'vllm-expert-profiler[cuda]' (or [cpu] without a GPU)"
    return "run: pip install 'vllm-expert-profiler[profile]'"
