"""What a Hugging Face float32 forward pass chooses, in every layer with experts.

Router inputs and logits come from hooks on transformers' own modules; the formulas that turn them
into ids and weights are written down here once more, and where transformers' module returns its
choice the two are held against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tests.support.harness import Log

#: Scores of the last expert taken and the first one left out closer than this are a tie.
NEAR_TIE = 1e-5
WEIGHT_TOLERANCE = 1e-4

_ROUTER = re.compile(r"\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router)$")


class Choice(NamedTuple):
    """What a router chose.

    Attributes:
        ids: [n, top_k].
        weights: [n, top_k], before any factor that is applied after the experts.
        gaps: [n], how far the choice is from being another one.
    """

    ids: Any
    weights: Any
    gaps: Any


@dataclass
class Agreement:
    """How a log compares with the oracle.

    Attributes:
        compared: rows.
        different: (req_id, token_idx, layer, logged ids, oracle ids, gap) with other ids.
        near_ties: those of them whose choice hangs on less than the gap that counts as a tie.
        worst_weight: largest difference of a weight in rows with equal ids.
    """

    compared: int = 0
    different: list[tuple[Any, ...]] = field(default_factory=list)
    near_ties: list[tuple[Any, ...]] = field(default_factory=list)
    worst_weight: float = 0.0

    def add(
        self,
        place: tuple[Any, ...],
        row: Mapping[str, Any],
        want: tuple[list[int], list[float], float],
        near_tie: float,
    ) -> None:
        """Compare one logged row with the ids, weights and gap that it should have."""
        self.compared += 1
        want_ids, want_weights, gap = want
        if sorted(row["topk_ids"]) != sorted(want_ids):
            entry = (*place, row["topk_ids"], want_ids, gap)
            (self.near_ties if gap < near_tie else self.different).append(entry)
            return
        weight_of = dict(zip(want_ids, want_weights, strict=True))
        pairs = zip(row["topk_ids"], row["topk_weights"], strict=True)
        worst = max(abs(weight - weight_of[expert]) for expert, weight in pairs)
        self.worst_weight = max(self.worst_weight, worst)


# ---- the routers' formulas ---------------------------------------------------------------------


def top(scores: Any, weights: Any, k: int) -> Choice:
    """The ``k`` highest ``scores`` [n, experts] of a row, and their ``weights`` [n, experts]."""
    import torch

    values, ids = torch.topk(scores, k + 1, dim=-1)
    ids = ids[:, :k]
    return Choice(ids, weights.gather(1, ids), values[:, k - 1] - values[:, k])


def normalized(choice: Choice) -> Choice:
    return choice._replace(weights=choice.weights / choice.weights.sum(dim=-1, keepdim=True))


def softmax_top(logits: Any, config: Any, bias: Any) -> Choice:
    """Softmax over all experts, then the highest; normalised where the config says so."""
    import torch

    del bias
    probabilities = torch.softmax(logits, dim=-1)
    choice = top(probabilities, probabilities, config.num_experts_per_tok)
    return normalized(choice) if getattr(config, "norm_topk_prob", True) else choice


def grouped(logits: Any, config: Any, bias: Any) -> Choice:
    """The best groups first, then the highest experts in them (DeepSeek, GLM).

    With a correction bias: sigmoid scores, a group counts as its two highest biased ones, and the
    bias takes part in the choice but not in the weights. Without: softmax scores, a group counts
    as its highest one.
    """
    import torch

    scores = torch.softmax(logits, dim=-1) if bias is None else logits.sigmoid()
    biased = scores if bias is None else scores + bias
    per_group = biased.view(len(biased), config.n_group, -1)
    group_scores = per_group.topk(1 if bias is None else 2, dim=-1).values.sum(dim=-1)
    groups = top(group_scores, group_scores, config.topk_group)
    taken = torch.zeros_like(group_scores).scatter_(1, groups.ids, 1).bool()
    allowed = taken.unsqueeze(-1).expand_as(per_group).reshape(biased.shape)
    choice = top(biased.masked_fill(~allowed, float("-inf")), scores, config.num_experts_per_tok)
    choice = choice._replace(gaps=torch.minimum(choice.gaps, groups.gaps))
    # transformers' DeepSeek-V2 never normalises, whatever its config says.
    return normalized(choice) if bias is not None and config.norm_topk_prob else choice


def ernie(logits: Any, config: Any, bias: Any) -> Choice:
    """Softmax, the highest of score plus bias, weights without the bias, normalised."""
    import torch

    scores = torch.softmax(logits, dim=-1)
    return normalized(top(scores + bias, scores, config.moe_k))


def sparse_mixer(logits: Any, config: Any, bias: Any) -> Choice:
    """Phi: the highest, then the next; each weighed among its near equals alone."""
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    del bias
    weights, ids = sparsemixer(logits, config.router_jitter_noise, training=False)
    values = torch.topk(logits, 3, dim=-1).values
    return Choice(ids, weights, torch.minimum(*(values[:, :2] - values[:, 1:]).unbind(dim=1)))


_FORMULAS: dict[str, Callable[[Any, Any, Any], Choice]] = {
    "deepseek_v2": grouped,
    "deepseek_v3": grouped,
    "glm4_moe": grouped,
    "ernie4_5_moe": ernie,
    "phimoe": sparse_mixer,
}


# ---- transformers' forward pass ----------------------------------------------------------------


def load(model: str, zeroed: Collection[str] = ()) -> Any:
    """transformers' model in float32.

    Args:
        model: its folder.
        zeroed: last parts of the names of parameters to set to zero.
    """
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, tensor in oracle.state_dict().items():
        if name.rpartition(".")[2] in zeroed:
            tensor.zero_()
    return oracle


def routers(oracle: Any) -> dict[int, Any]:
    """The router modules by layer index; dense layers have none."""
    found = ((_ROUTER.search(name), module) for name, module in oracle.named_modules())
    return {int(match[1]): module for match, module in found if match}


def choose(oracle: Any, layer: int, logits: Any) -> Choice:
    """What a layer's router makes of its logits [n, experts] float32."""
    block = getattr(oracle.model.layers[layer], "mlp", None)
    owner = getattr(block, "moe_statics", routers(oracle)[layer])  # Ernie's is beside the router
    bias = getattr(owner, "e_score_correction_bias", None)
    formula = _FORMULAS.get(oracle.config.model_type, softmax_top)
    return formula(logits, oracle.config, None if bias is None else bias.reshape(-1))


def choices(oracle: Any, tokens: Sequence[int]) -> dict[int, Choice]:
    """What every layer with experts chooses for ``tokens``, by layer index."""
    import torch
    from torch.nn.functional import linear

    results: dict[int, Choice] = {}

    def look(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            inner = getattr(module, "layer", module)  # Granite's gate wraps its Linear
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            logits = linear(x, inner.weight.float(), getattr(inner, "bias", None))
            results[layer] = choose(oracle, layer, logits)
            _agrees_with_its_own_module(results[layer], output, oracle.config)

        return hook

    hooks = [module.register_forward_hook(look(i)) for i, module in routers(oracle).items()]
    with torch.inference_mode():
        oracle(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return results


def _agrees_with_its_own_module(choice: Choice, output: Any, config: Any) -> None:
    """Hold a formula against the choice of transformers' router, where that returns one."""
    import torch

    if not isinstance(output, tuple) or len(output) != 2:
        return
    if config.model_type == "gpt_oss":
        dense, ids = output  # [n, experts]
        weights = dense.gather(1, ids)
    else:
        ids, weights = output
        weights = weights / config.routed_scaling_factor
    ours, theirs = choice.ids.sort(dim=1), ids.sort(dim=1)
    sure = choice.gaps >= NEAR_TIE
    assert torch.equal(ours.values[sure], theirs.values[sure])
    mine = choice.weights.gather(1, ours.indices)[sure]
    torch.testing.assert_close(mine, weights.gather(1, theirs.indices)[sure])


def compare(
    log: Log,
    outputs: Sequence[Mapping[str, Any]],
    oracle: Any,
    near_tie: float = NEAR_TIE,
) -> Agreement:
    """Compare every logged row with the oracle's forward pass over prompt + output.

    Args:
        log: the log.
        outputs: what its requests were and became.
        oracle: a model from :func:`load`.
        near_tie: gap under which another choice is a tie.
    """
    result = Agreement()
    for output in outputs:
        req_id = output["req_id"]
        made = choices(oracle, output["prompt_token_ids"] + output["token_ids"])
        for layer, choice in made.items():
            rows = zip(*(part.tolist() for part in choice), strict=True)
            for position, want in enumerate(rows):
                row = log.routes.get((req_id, position, layer))
                if row is not None:
                    result.add((req_id, position, layer), row, want, near_tie)
    return result


def compare_rows(rows: Sequence[Mapping[str, Any]], choice: Choice) -> Agreement:
    """Compare one layer's logged rows with a choice made from the engine's own logits."""
    result = Agreement()
    wanted = zip(*(part.tolist() for part in choice), strict=True)
    for row, want in zip(rows, wanted, strict=True):
        result.add((row["req_id"], row["token_idx"], row["layer"]), row, want, NEAR_TIE)
    return result
