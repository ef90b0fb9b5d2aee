# SPDX-License-Identifier: Apache-2.0
"""Writing: runs where it may block. Rows, self-check, formats, rotation."""
