# SPDX-License-Identifier: Apache-2.0
"""MoE route recording: which experts every token was sent to, in every MoE layer.

A token's way reads in this order: ``hooks`` -> ``capture`` (in the forward pass: a reference, or
the static device buffer) -> ``recording`` (between passes: the snapshot and the step's metadata) ->
``writing`` (on a thread: rows, self-check, file). ``recorder`` ties them to a worker. Imports run
one way: recorder -> recording -> writing -> capture -> counts, layers, schema, config, errors.

Nothing is imported here: ``vllm.envs`` loads ``config`` from this package at start-up, and tools
load ``schema`` without vLLM.
"""
