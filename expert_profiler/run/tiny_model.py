# SPDX-License-Identifier: Apache-2.0
"""Build a small Qwen2-MoE checkpoint with the routing shape of Qwen1.5-MoE-A2.7B.

24 layers, 60 experts, top-4 and a shared expert, as in the real model; hidden size 128 and a
byte-level tokenizer instead of the real ones, so that it runs anywhere. The weights are
random: routing is exercised for real, the text means nothing. The same spec gives the same
bytes, on every run and machine with the same numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from expert_profiler import files
from expert_profiler.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.float32]

# Raise it when the same spec would give other bytes than before: older checkpoints are rebuilt.
BUILDER_VERSION = 2
SPEC_FILE = "tiny_moe_spec.json"
FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    SPEC_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
)

# Token ids 0-255 are the bytes themselves; these follow.
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
EOS_ID, PAD_ID, _, IM_END_ID = range(256, 260)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Standard deviation of a router logit over tokens. The real model's probabilities spread about
# as much, and the wider the spread, the rarer two experts that tie at the edge of the top k.
ROUTER_LOGIT_STD = 2.0


@dataclass(frozen=True)
class TinyMoeSpec:
    """What decides the bytes of a checkpoint. Sizes are in elements."""

    layers: int = 24
    experts: int = 60
    top_k: int = 4
    hidden: int = 128
    heads: int = 4
    moe_intermediate: int = 64
    shared_intermediate: int = 128
    max_positions: int = 2048
    seed: int = 0


# ---- weights ----------------------------------------------------------------


def bfloat16_exact(values: Array) -> Array:
    """Round float32 to the nearest bfloat16 (ties to even), kept as float32, same shape.

    An engine in bfloat16 and an oracle in float32 then start from equal weights.
    """
    import numpy as np

    bits = values.view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def weights(spec: TinyMoeSpec) -> Iterator[tuple[str, Array]]:
    """Every tensor of the checkpoint as (name, [out, in] float32), in a fixed order."""
    import numpy as np

    rng = np.random.default_rng(spec.seed)
    hidden = spec.hidden

    def normal(*shape: int, std: float) -> Array:
        # `scale` keeps the array float32: a Python float times float32 does.
        return bfloat16_exact(rng.standard_normal(shape, dtype=np.float32) * np.float32(std))

    def linear(out_size: int, in_size: int, gain: float = 1.0) -> Array:
        """Maps a unit-RMS input to an output of RMS ``gain``."""
        return normal(out_size, in_size, std=gain / math.sqrt(in_size))

    # Half of an embedding's length is shared by all tokens. It stays in the residual stream,
    # gives every router a bias, and so makes some experts busier than others.
    common = rng.standard_normal(hidden, dtype=np.float32) * np.float32(0.6)
    yield "model.embed_tokens.weight", bfloat16_exact(common + normal(VOCAB_SIZE, hidden, std=0.8))

    for layer in range(spec.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", np.ones(hidden, np.float32)
        for name in ("q", "k", "v"):
            # Queries and keys with some gain: attention then looks at a few positions.
            gain = 1.0 if name == "v" else 1.5
            yield f"{at}.self_attn.{name}_proj.weight", linear(hidden, hidden, gain)
            yield f"{at}.self_attn.{name}_proj.bias", normal(hidden, std=0.1)
        yield f"{at}.self_attn.o_proj.weight", linear(hidden, hidden, 0.7)
        yield f"{at}.post_attention_layernorm.weight", np.ones(hidden, np.float32)
        yield f"{at}.mlp.gate.weight", linear(spec.experts, hidden, ROUTER_LOGIT_STD)
        for expert in range(spec.experts):
            yield from mlp(f"{at}.mlp.experts.{expert}", spec.moe_intermediate, hidden, linear)
        yield from mlp(f"{at}.mlp.shared_expert", spec.shared_intermediate, hidden, linear)
        yield f"{at}.mlp.shared_expert_gate.weight", linear(1, hidden)

    yield "model.norm.weight", np.ones(hidden, np.float32)
    head = linear(VOCAB_SIZE, hidden, 4.0)
    # Quieter rows for bytes that are no printable ASCII: the output can be looked at.
    quiet = [token for token in range(VOCAB_SIZE) if not 32 <= token < 127 and token != EOS_ID]
    head[quiet] = bfloat16_exact(head[quiet] * np.float32(0.25))
    # At full strength one token in 96 would end its text, and most texts would be short.
    head[EOS_ID] = bfloat16_exact(head[EOS_ID] * np.float32(0.85))
    yield "lm_head.weight", head


def mlp(at: str, inner: int, hidden: int, linear: Any) -> Iterator[tuple[str, Array]]:
    """A gated feed-forward block: gate and up [inner, hidden], down [hidden, inner]."""
    yield f"{at}.gate_proj.weight", linear(inner, hidden)
    yield f"{at}.up_proj.weight", linear(inner, hidden)
    # silu(gate) * up has an RMS of about a half; the gain makes up for it.
    yield f"{at}.down_proj.weight", linear(hidden, inner, 1.5)


# ---- the other files --------------------------------------------------------


def model_config(spec: TinyMoeSpec) -> dict[str, Any]:
    """config.json: the keys that vLLM and transformers read, with Qwen1.5-MoE's choices."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "attention_dropout": 0.0,
        "bos_token_id": EOS_ID,
        "decoder_sparse_step": 1,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "intermediate_size": spec.shared_intermediate,
        "max_position_embeddings": spec.max_positions,
        "mlp_only_layers": [],
        "moe_intermediate_size": spec.moe_intermediate,
        "norm_topk_prob": False,
        "num_attention_heads": spec.heads,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "shared_expert_intermediate_size": spec.shared_intermediate,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }


def byte_alphabet() -> list[str]:
    """The character that byte-level BPE writes for each of the 256 bytes, by byte value.

    Printable Latin-1 stands for itself, the other bytes for U+0100 upwards (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its config: one token a byte, so any text comes back exactly."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    eos, pad, *_ = SPECIAL_TOKENS
    config = tokenizer_config(eos, pad, longest=1_000_000)
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": CHAT_TEMPLATE})


def tokenizer_config(end: str, pad: str, longest: int) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer.json, for transformers and vLLM.

    end and pad are special tokens; longest is in tokens.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": end,
        "pad_token": pad,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
    }


def model_card(spec: TinyMoeSpec) -> str:
    """README.md of the checkpoint."""
    return (
        "# Tiny Qwen2-MoE, random weights\n\n"
        "The weights are random: nothing was trained, and the text it writes means nothing.\n"
        f"Shape: {spec.layers} layers, {spec.experts} experts, top-{spec.top_k}, a shared expert, "
        f"hidden size {spec.hidden}, byte-level tokenizer, seed {spec.seed}.\n"
        "Built by vllm-expert-profiler to exercise expert routing.\n"
    )


def identity(spec: TinyMoeSpec) -> dict[str, int]:
    """What :data:`SPEC_FILE` holds: equal identities mean equal checkpoints."""
    return {"builder_version": BUILDER_VERSION, **asdict(spec)}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---- building ---------------------------------------------------------------


def build(out: Path, spec: TinyMoeSpec) -> None:
    """Write the checkpoint of ``spec`` to the folder ``out``: all of it or, on failure, nothing.

    A folder is replaced only where everything in it is a file that this writes.
    """
    check_replaceable(out)
    from safetensors.numpy import save_file

    with files.replacing(out) as fresh:
        fresh.mkdir(parents=True)
        save_file(dict(weights(spec)), fresh / "model.safetensors", metadata={"format": "pt"})
        write_json(fresh / "config.json", model_config(spec))
        write_json(
            fresh / "generation_config.json",
            {"bos_token_id": EOS_ID, "eos_token_id": [EOS_ID, IM_END_ID], "pad_token_id": PAD_ID},
        )
        write_tokenizer(fresh)
        (fresh / "README.md").write_text(model_card(spec), encoding="utf-8")
        write_json(fresh / SPEC_FILE, identity(spec))


def check_replaceable(out: Path) -> None:
    """Raise a :class:`UserError` if ``out`` holds something that must not be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is not a folder; name another one")
    present = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    foreign = [name for name in present if name not in FILES]
    if foreign:
        raise UserError(
            f"{out} holds files that are not of a tiny checkpoint ({foreign[0]}); "
            "name another folder"
        )


def holds(out: Path, spec: TinyMoeSpec) -> bool:
    """Whether ``out`` is a complete checkpoint of this very spec."""
    try:
        recorded = json.loads((out / SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(recorded == identity(spec)) and all((out / name).is_file() for name in FILES)


def ensure(out: Path) -> None:
    """Have the default checkpoint in ``out``: built, or rebuilt where it is another one."""
    if not holds(out, TinyMoeSpec()):
        print(f"building {out}: a small checkpoint with random weights", flush=True)
        build(out, TinyMoeSpec())
