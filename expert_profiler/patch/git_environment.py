# SPDX-License-Identifier: Apache-2.0
"""The environment in which git sees neither the user's settings nor a repository around it."""

from __future__ import annotations

import os
from pathlib import Path


def git_environment(folder: Path) -> dict[str, str]:
    """Environment for running git in ``folder`` as if that lay outside every repository.

    Without it, ``git apply`` in a folder inside another repository, such as a
    .venv in a checkout, exits 0 and does nothing.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return kept | {
        "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
