# SPDX-License-Identifier: Apache-2.0
"""Capture: runs in the forward pass. No I/O, no waiting, no allocation in a CUDA graph."""
