# SPDX-License-Identifier: Apache-2.0
"""Report: counts and metrics become tables, charts and pages."""
