# SPDX-License-Identifier: Apache-2.0
"""The recorder's exceptions."""


class RouteLogError(RuntimeError):
    """Recording can't be done as asked; the message says the fact, the place and the remedy."""


class ConflictError(RouteLogError):
    """The command does not fit what the recorder does at the moment."""
