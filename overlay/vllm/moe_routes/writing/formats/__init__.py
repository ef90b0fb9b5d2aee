# SPDX-License-Identifier: Apache-2.0
"""Formats: how rows become bytes. Nothing is imported here, see ``dataset``."""
