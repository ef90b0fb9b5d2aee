# SPDX-License-Identifier: Apache-2.0
"""Expert-distribution recording over HTTP: configure, start, stop, reset, dump, status, a page.

A request's way reads in this order: ``guard`` (who asks, and is the request well formed) ->
``api_router`` (the routes) -> ``engines`` (every worker of every engine) -> ``answers`` (what they
said, as JSON). ``names`` keeps files in their folder, ``metrics`` feeds ``/metrics``.
"""
