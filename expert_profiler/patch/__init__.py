# SPDX-License-Identifier: Apache-2.0
"""Patch: apply, check and revert the vLLM patch. Standard library only."""
