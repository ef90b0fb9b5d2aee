# SPDX-License-Identifier: Apache-2.0
"""Metrics: a formula, its unit, its range. Pure numpy."""
