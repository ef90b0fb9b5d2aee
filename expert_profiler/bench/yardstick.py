# SPDX-License-Identifier: Apache-2.0
"""The method of public loggers, to compare with: a benchmark, not a mode of the product.

In every layer of every forward pass the choices are copied to the host, which waits for the device,
and each row is written as a line of JSON, from the forward pass itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Yardstick:
    """Stands in for the hook ``_log_moe_routes``.

    Args:
        path: file to write.
        layers: module name -> layer index.
    """

    def __init__(self, path: Path, layers: Mapping[str, int]) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._layers = layers
        self._next_token = dict.fromkeys(layers.values(), 0)
        self.rows = 0

    def write(self, layer: Any, topk_ids: Any, topk_weights: Any, *_: int) -> None:
        """Write one layer's rows; ids and weights are [n, K] tensors."""
        index = self._layers[layer.layer_name]
        first = self._next_token[index]
        ids, weights = topk_ids.cpu().tolist(), topk_weights.float().cpu().tolist()
        for i, (chosen, given) in enumerate(zip(ids, weights, strict=True)):
            record = {
                "type": "route",
                "req_id": "batch",
                "token_idx": first + i,
                "layer": index,
                "topk_ids": chosen,
                "topk_weights": given,
            }
            self._file.write(json.dumps(record) + "\n")
        self._next_token[index] = first + len(ids)
        self.rows += len(ids)

    def close(self) -> None:
        self._file.close()
