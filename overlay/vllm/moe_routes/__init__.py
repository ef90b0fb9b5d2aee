# SPDX-License-Identifier: Apache-2.0
"""MoE route recording: which experts every token was sent to, in every MoE layer.

A token's way reads in this order: ``hooks`` -> ``capture`` (the static device buffer) ->
``snapshot`` (device to host) -> ``rows`` (request, position, phase) -> ``session`` (one file, from
its header to its end record). ``recorder`` ties them to a worker, ``writer`` gives them a thread.

Nothing is imported here: ``vllm.envs`` loads ``config`` from this package at start-up.
"""
