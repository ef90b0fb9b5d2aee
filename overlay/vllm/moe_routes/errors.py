# SPDX-License-Identifier: Apache-2.0
"""The recorder's one exception."""


class RouteLogError(RuntimeError):
    """Recording can't be done as asked; the message says the fact, the place and the remedy."""
