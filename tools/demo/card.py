# SPDX-License-Identifier: Apache-2.0
"""The demo model's card: figures as tables, the loss curve as a picture."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tools.demo.specialists import CLASSES

CURVE = "loss_curve.png"
#: Of one nat.
BITS = 1 / math.log(2)
KINDS = {"library": "Python's standard library", "problems": "generated word problems"}


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table that reads well as plain text too.

    Args:
        columns: heading -> format of a cell, filled in from its row.
        rows: of values by name.
    """
    cells = [[form.format_map(row) for form in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def tables(facts: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, str]:
    """By name, those of the card and of the evidence command."""
    bits = "{{{0}[bits_per_token]:.2f}} ({{{0}[bits_per_byte]:.2f}})"
    judged = {
        f"{name}, bits a token (a byte)": bits.format(name)
        for name in ("model", "trigram", "unigram")
    }
    trained, untrained = (evidence["information"][name] for name in ("trained", "untrained"))
    specialists = [
        {**found, "tokens": " ".join(shown(text) for text, _ in found["top"][:6])}
        for found in evidence["specialists"]
    ]
    phases = {"name": "prefill against decode of problems", **evidence["phases"]}
    return {
        "held_out": table(
            {"held-out text": "{kind}", "tokens": "{tokens:,}", **judged},
            [{**found, "kind": KINDS[kind]} for kind, found in facts["held_out"].items()],
        ),
        "information": table(
            {
                "layer": "{layer}",
                "trained, bits": "{observed:.3f}",
                "before training": "{before:.3f}",
                "by chance": "{null_mean:.3f}",
                "p": "{p_value:.3f}",
            },
            [
                {**row, "before": other["observed"]}
                for row, other in zip(trained, untrained, strict=True)
            ],
        ),
        "specialists": table(
            {
                "layer": "{layer}",
                "expert": "{expert}",
                "takes": "{class_name}",
                "of its choices": "{share:.0%}",
                "of all": "{expected:.0%}",
                "its load": "{load:.1%}",
                "top tokens": "{tokens}",
            },
            specialists,
        ),
        "differences": table(
            {
                "compared": "{name}",
                "requests": "{sizes}",
                "divergence, bits": "{bits:.4f}",
                "by chance": "{by_chance:.4f}",
                "p": "{p_value:.4f}",
            },
            [
                *(
                    {**row, "sizes": " + ".join(map(str, row["requests"]))}
                    for row in evidence["differences"]
                ),
                {**phases, "sizes": evidence["requests"]["problems-a"]},
            ],
        ),
    }


def shown(text: str) -> str:
    """A token as code; what is not to be seen is spelled out, and pipes would end the cell."""
    if text and not text.strip(" "):
        return f"`{len(text)} spaces`" if len(text) > 1 else "`space`"
    plain = text.replace("\n", "\\n").replace("|", "\u2758").replace("`", "'")
    return f"`{plain}`"


def end_of(prompt: str, characters: int = 300) -> str:
    """The prompt's last lines, as many as fit, and always the last one."""
    kept = prompt[-characters:]
    return kept if kept == prompt else "\u2026\n" + (kept.partition("\n")[2] or kept)


def flow(prose: str) -> str:
    """Paragraphs and list items, each wrapped at 100 characters."""
    parts = re.split(r"(\n\n|\n(?=- ))", prose.strip("\n"))
    wrapped = [
        textwrap.fill(
            " ".join(part.split()),
            100,
            subsequent_indent="  " if part.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for part in parts[::2]
    ]
    return "".join(part + gap for part, gap in zip(wrapped, [*parts[1::2], "\n"], strict=True))


def text(facts: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """README.md."""
    markdown = jinja2.Environment(  # noqa: S701 (it makes no HTML)
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    markdown.filters |= {"flow": flow, "ending": end_of}
    template = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    return markdown.from_string(template).render(
        facts=facts, evidence=evidence, tables=tables(facts, evidence), classes=CLASSES, bits=BITS
    )


def draw_curve(path: Path, facts: Mapping[str, Any]) -> None:
    """Training and held-out loss over the tokens seen, with the baselines as lines."""
    from matplotlib.figure import Figure

    a_step = facts["settings"]["blocks"] * 512 / 1e6
    rows = facts["rows"]
    figure = Figure(figsize=(6.4, 3.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    seen = [row[0] * a_step for row in rows]
    axes.plot(seen, [row[1] * BITS for row in rows], color="0.65", lw=1, label="training, all text")
    judged = [row for row in rows if row[2] is not None]
    axes.plot(
        [row[0] * a_step for row in judged],
        [row[2] * BITS for row in judged],
        color="C0",
        marker="o",
        ms=3,
        label="part of the held-out library",
    )
    for name, style in (("unigram", ":"), ("trigram", "--")):
        value = facts["curve_baselines"][name]
        axes.axhline(value, color="black", lw=0.9, ls=style, label=f"{name}, same held-out text")
    axes.set(xlabel="tokens seen, millions", ylabel="bits a token", xlim=(0, None))
    axes.set_title("The model learns more than runs of three tokens", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
