# SPDX-License-Identifier: Apache-2.0
"""Clients of a real server, who notice when it is gone."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import httpx
import openai

PROMPTS = [f"{i} bakers fill {i + 3} trays with rolls. " * (1 + i % 3) for i in range(6)]
MAX_TOKENS = 300


class Clients:
    """Streaming completions, each client one after the other, until the server goes or they stop.

    ``executed`` counts what the clients saw: prompt + received - 1 tokens of every answer, whole
    or cut. The server may have executed more, and never less. ``owed`` is what it executes where it
    goes on to the end of every request.
    """

    def __init__(self, url: str, prompts: list[str] = PROMPTS) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(p,)) for p in prompts]
        #: Tokens.
        self.executed = 0
        self.owed = 0
        self.whole = 0
        self.cut = 0

    def _run(self, prompt: str) -> None:
        while not self._over.is_set():
            with contextlib.suppress(openai.OpenAIError, httpx.HTTPError):
                self._complete(prompt)

    def _complete(self, prompt: str) -> None:
        usage: Any = None
        whole = False
        try:
            stream = self._client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=MAX_TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={
                    "ignore_eos": True,
                    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                },
            )
            for chunk in stream:
                usage = chunk.usage or usage
                whole = whole or any(choice.finish_reason == "length" for choice in chunk.choices)
        finally:
            with self._lock:
                if usage is not None and usage.completion_tokens:
                    self.executed += usage.prompt_tokens + usage.completion_tokens - 1
                    self.owed += usage.prompt_tokens + MAX_TOKENS - 1
                self.whole += whole
                self.cut += not whole
                if not whole:
                    self._over.set()  # the server is going

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
