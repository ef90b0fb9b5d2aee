# SPDX-License-Identifier: Apache-2.0
"""What the demo model reads: Python's standard library and word problems, split by document.

The text of the standard library depends on the Python that runs this; ``Corpus.sha256`` says which
text it was. Files with no prose and no program in them (character tables, build settings) and the
test suites are left out; every 16th document in sorted order is held out.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tools.demo.problems import problems

HELD_OUT_EVERY = 16
TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 8_000, 200
TRAINING_SEED, HELD_OUT_SEED = 1, 2
#: Folders below the standard library that are left out.
NOT_READ = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "idle_test", "lib2to3",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
LONGEST = 150_000  # bytes; larger ones are generated, and the documentation's topics (below)
TOPICS = Path("pydoc_data/topics.py")


@dataclass(frozen=True)
class Corpus:
    """Documents by kind, "library" and "problems", for training and held out."""

    training: dict[str, list[str]]
    held_out: dict[str, list[str]]

    def training_documents(self) -> list[str]:
        return [text for kind in sorted(self.training) for text in self.training[kind]]

    @property
    def sha256(self) -> str:
        """Of every document in order, each with its length: two equal ones hold the same text."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for text in (text for kind in sorted(part) for text in part[kind]):
                data = text.encode()
                digest.update(b"%d\n" % len(data) + data)
        return digest.hexdigest()


def library_files(root: Path) -> list[Path]:
    """The standard library's files to read, relative to ``root``, sorted."""
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if NOT_READ & set(inside.parts) or any(p.startswith("config-") for p in inside.parts):
            continue
        if inside != TOPICS and not inside.name.startswith("_sysconfigdata"):
            found.append(inside)
    return sorted(found)


def library(root: Path) -> Iterator[str]:
    """The documents of the standard library: its files, then the help topics ``help()`` shows."""
    for inside in library_files(root):
        data = (root / inside).read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:  # a file in another encoding, which it declares
            continue
        if 200 < len(data) <= LONGEST:
            yield text.replace("\r\n", "\n").expandtabs(8)
    yield from topics(root)


def topics(root: Path) -> Iterator[str]:
    """The help topics, prose about the language; none where a distribution leaves them out."""
    file = root / TOPICS
    if not file.is_file():
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            yield from (text for _, text in sorted(ast.literal_eval(node).items()))


def corpus(root: Path | None = None) -> Corpus:
    """Everything that is read.

    Args:
        root: the standard library's folder; None takes this Python's.
    """
    documents = list(library(root or Path(sysconfig.get_path("stdlib"))))
    training = [text for i, text in enumerate(documents) if i % HELD_OUT_EVERY]
    asked = list(islice(problems(TRAINING_SEED), TRAINING_PROBLEMS))
    known = set(asked)
    others = (text for text in problems(HELD_OUT_SEED) if text not in known)
    return Corpus(
        training={"library": training, "problems": asked},
        held_out={
            "library": documents[::HELD_OUT_EVERY],
            "problems": list(islice(others, HELD_OUT_PROBLEMS)),
        },
    )
