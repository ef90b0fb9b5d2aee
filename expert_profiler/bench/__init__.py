# SPDX-License-Identifier: Apache-2.0
"""Bench: what recording costs, measured."""
