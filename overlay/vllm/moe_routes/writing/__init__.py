# SPDX-License-Identifier: Apache-2.0
"""Writing: runs where it may block. Rows, self-check, formats, rotation.

Nothing is imported here: tools load ``formats.dataset`` without vLLM.
"""
