# SPDX-License-Identifier: Apache-2.0
"""Where this checkout lies."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
