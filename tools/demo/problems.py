# SPDX-License-Identifier: Apache-2.0
"""Word problems with worked answers, made from templates: as many as wanted, from a seed.

Written for this project and free to use like the rest of it. The 25 problems that ./test.sh falls
back to (expert_profiler/data/word_problems.txt) are not among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import jinja2

#: Lists of words, and templates with a blank line between them: what is drawn, the sentences of
#: the question, and those of the answer.
SOURCE = Path(__file__).with_name("problems.txt.j2")


def problems(seed: int) -> Iterator[str]:
    """Problems without end: question, blank line, "Answer: " and its sentences, line end."""
    rng = random.Random(seed)
    plain = jinja2.Environment(  # noqa: S701 (it makes no HTML)
        line_statement_prefix="#", undefined=jinja2.StrictUndefined
    )
    lists, *sources = SOURCE.read_text(encoding="utf-8").split("\n\n")
    words: dict[str, list[str]] = {}
    for line in lists.splitlines():
        name, _, listed = line.partition(": ")
        words.setdefault(name, []).extend(listed.split())
    templates = [plain.from_string(source, words) for source in sources]
    draws = {"pick": rng.choice, "draw": rng.randint, "two": lambda of: rng.sample(of, 2)}
    while True:
        sentences = rng.choice(templates).render(draws).splitlines()
        yield " ".join(sentences).replace("? ", "?\n\nAnswer: ", 1) + "\n"
