# SPDX-License-Identifier: Apache-2.0
"""Which experts did every token go to? Read, show, compare and record vLLM's MoE routing."""

__version__ = "0.2.0"
