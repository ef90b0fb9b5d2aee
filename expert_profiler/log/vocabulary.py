# SPDX-License-Identifier: Apache-2.0
"""Classify every token of a log: ``outputs.jsonl`` has the ids, the checkpoint the texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_profiler.errors import UserError
from expert_profiler.log import outputs as run_outputs
from expert_profiler.log.tokens import TokenBatch
from expert_profiler.metrics import token_types

#: The permutation test of a layer looks at no more tokens than this.
SAMPLE_TOKENS = 20_000


class UnavailableError(Exception):
    """Token types can't be shown; the message says why, and the report repeats it."""


def find(
    log: Path, model_id: str, outputs: Path | None = None, tokenizer: Path | None = None
) -> tuple[Path, Path]:
    """(outputs.jsonl, tokenizer.json) of a run.

    outputs: default, ``outputs.jsonl`` beside the log. tokenizer: a checkpoint's folder; default,
    ``model_id`` where that is a folder here or beside the log.

    Raises:
        UnavailableError: one of the two is not there.
        UserError: one that was named is not there.
    """
    if outputs is not None and not outputs.is_file():
        raise UserError(f"no file {outputs}; name the run's outputs.jsonl with --outputs")
    texts = outputs or run_outputs.beside(log)
    if texts is None:
        raise UnavailableError(f"no outputs.jsonl beside {log.name}, so tokens are unknown")
    if tokenizer is not None:
        if not (tokenizer / "tokenizer.json").is_file():
            raise UserError(f"no tokenizer.json in {tokenizer}; name a checkpoint's folder")
        return texts, tokenizer / "tokenizer.json"
    for folder in (Path(model_id), log.parent / model_id):
        if (folder / "tokenizer.json").is_file():
            return texts, folder / "tokenizer.json"
    raise UnavailableError(
        f"no tokenizer.json in a local folder {model_id}; name the checkpoint's with --tokenizer"
    )


class Labels:
    """Gives each token of a batch its class; keeps the first tokens for permutation tests."""

    def __init__(self, names: list[str], outputs: Path, tokenizer_file: Path) -> None:
        """names: the log's request ids, by request index."""
        tokens = run_outputs.read_tokens(outputs)
        used = np.unique(np.concatenate([*tokens.values(), np.zeros(0, dtype=np.int64)]))
        classes = token_types.token_classes(*_texts(tokenizer_file, used))
        nothing = np.zeros(0, dtype=np.int8)
        self._codes = [
            classes[np.searchsorted(used, tokens[name])] if name in tokens else nothing
            for name in names
        ]
        if not any(map(len, self._codes)):
            raise UnavailableError(f"no request of the log stands in {outputs.name}")
        self._kept: list[tuple[Any, Any, Any]] = []
        self._room = SAMPLE_TOKENS

    def __call__(self, batch: TokenBatch) -> npt.NDArray[np.int8]:
        """[n] int8: codes into ``token_types.CLASSES``, -1 for a token that is not known."""
        found = np.full(len(batch), -1, dtype=np.int8)
        for request in np.unique(batch.request):
            here = np.flatnonzero(batch.request == request)
            codes = self._codes[request]
            here = here[batch.position[here] < len(codes)]
            found[here] = codes[batch.position[here]]
        self._keep(batch, found)
        return found

    def sample(self) -> tuple[Any, Any, Any]:
        """(classes [n], request [n], ids [n, layers, K]) of the first labelled tokens, in order."""
        labels, request, ids = zip(*self._kept, strict=True)
        return np.concatenate(labels), np.concatenate(request), np.concatenate(ids)

    def _keep(self, batch: TokenBatch, labels: npt.NDArray[np.int8]) -> None:
        if self._room:
            known = np.flatnonzero(labels >= 0)[: self._room]
            self._kept.append((labels[known], batch.request[known], batch.ids[known]))
            self._room -= len(known)


def _texts(tokenizer_file: Path, ids: npt.NDArray[np.int64]) -> tuple[list[str], set[str]]:
    """The text of each id, and the texts that are control tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the package raises no type of its own
        raise UserError(
            f"cannot read {tokenizer_file}: {str(error)[:200]}; name a checkpoint's folder with "
            "--tokenizer"
        ) from None
    special = {
        str(token.content)
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special
    }
    texts = []
    for token in ids.tolist():
        piece = tokenizer.id_to_token(token)
        text = tokenizer.decode([token], skip_special_tokens=False)
        # SentencePiece drops the space in front of a first word, and a lone space altogether.
        if not text and piece:
            text = piece.replace("\u2581", " ")
        texts.append(text)
    return texts, special
