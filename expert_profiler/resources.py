# SPDX-License-Identifier: Apache-2.0
"""What the library brings along: the patch, the recorder's source and the demo model.

In a checkout they stand at its top; a wheel carries them in ``expert_profiler/bundled``. Standard
library only: preflight and the patch commands run before anything is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from expert_profiler.errors import UserError

_LIBRARY = Path(__file__).resolve().parent
_BUNDLED = _LIBRARY / "bundled"
#: The folder that holds ``overlay/`` and the patch.
ROOT = _BUNDLED if _BUNDLED.is_dir() else _LIBRARY.parent
PATCH = ROOT / "vllm-v0.15.1-moe-logger.patch"
OVERLAY = ROOT / "overlay"

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
