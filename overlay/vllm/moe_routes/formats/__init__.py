# SPDX-License-Identifier: Apache-2.0
"""How rows become bytes."""
