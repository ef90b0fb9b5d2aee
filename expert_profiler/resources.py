# SPDX-License-Identifier: Apache-2.0
"""What the library brings along: the patch, the recorder's source and the demo model.

In a checkout they stand at its top; a wheel carries patch and source in
``expert_profiler/bundled``. Standard library only: preflight and the patch commands run before
anything is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

from expert_profiler.errors import IN_CHECKOUT, UserError

_LIBRARY = Path(__file__).resolve().parent
#: The folder that holds ``overlay/`` and the patch: the checkout, or the wheel's own.
ROOT = _LIBRARY.parent if IN_CHECKOUT else _LIBRARY / "bundled"
PATCH = ROOT / "vllm-v0.15.1-moe-logger.patch"
OVERLAY = ROOT / "overlay"
DEMO_MODEL = ROOT / "demo_model"  # 7 MB: not in the wheel
#: Where checkpoints that are built here are kept.
CACHE = (
    ROOT / ".cache"
    if IN_CHECKOUT
    else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-expert-profiler"
)

#: The name under which modules of the recorder are loaded here, where ``vllm`` may be missing.
_RECORDER = "expert_profiler._recorder"


def recorder_module(name: str) -> ModuleType:
    """A module of the recorder that needs no vLLM, such as ``schema``.

    Raises:
        UserError: the recorder's source is missing.
    """
    if _RECORDER not in sys.modules:
        source = OVERLAY / "vllm" / "moe_routes" / "__init__.py"
        spec = importlib.util.spec_from_file_location(
            _RECORDER, source, submodule_search_locations=[str(source.parent)]
        )
        if spec is None or spec.loader is None or not source.exists():
            raise UserError(f"{source} is missing; install the package again, or check out whole")
        package = importlib.util.module_from_spec(spec)
        sys.modules[_RECORDER] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_RECORDER}.{name}")


def program() -> str:
    """What to type in front of a command's name so that the line works as it is printed.

    ``expert-profiler`` where the shell finds this environment's, else its path, else this Python.
    """
    python, here = Path(sys.executable), Path.cwd()
    script = python.with_name("expert-profiler")
    if shutil.which(script.name) == str(script):
        return script.name
    if script.is_file():
        return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
    where = "" if not IN_CHECKOUT or here == ROOT else f"PYTHONPATH={shlex.quote(str(ROOT))} "
    return f"{where}{shlex.quote(str(python))} -m expert_profiler"
