# SPDX-License-Identifier: Apache-2.0
"""Recording: runs on the engine thread between forward passes, where nothing may raise."""
