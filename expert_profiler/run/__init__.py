# SPDX-License-Identifier: Apache-2.0
"""Run: models, prompts, engine, preflight, timing."""
