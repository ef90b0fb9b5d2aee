# SPDX-License-Identifier: Apache-2.0
"""Log: open, read, count, query and check a route log of any format."""
