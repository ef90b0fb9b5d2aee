"""The tiny checkpoint: the real routing shape, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_profiler.errors import UserError
from expert_profiler.run import models, tiny_model
from expert_profiler.run.tiny_model import TinyMoeSpec, build
from tests.support.paths import REPO

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SMALL = TinyMoeSpec(layers=2, experts=6, top_k=2, hidden=64, heads=2)


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "moe"
    build(folder, TinyMoeSpec())
    return folder


@pytest.fixture(scope="module")
def tokenizer(real: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(real)


def test_it_routes_as_qwen15_moe_does(real: Path) -> None:
    config = json.loads((real / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert config["num_hidden_layers"] == 24
    assert config["num_experts"] == 60
    assert config["num_experts_per_tok"] == 4
    assert config["norm_topk_prob"] is False
    assert config["shared_expert_intermediate_size"] > 0
    models.check_config(str(real), config, "all")


def test_every_tensor_of_the_model_is_there(real: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.from_pretrained(real)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in tensors(real).items()} == wanted


def test_weights_lose_nothing_in_bfloat16(real: Path) -> None:
    for name, tensor in tensors(real).items():
        assert tensor.dtype == np.float32, name
        assert not (tensor.view(np.uint32) & 0xFFFF).any(), name


@given(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100))
def test_rounding_to_bfloat16_is_torchs(value: float) -> None:
    torch = pytest.importorskip("torch")
    given_value = np.array([value], np.float32)
    expected = torch.from_numpy(given_value.copy()).to(torch.bfloat16).float().numpy()
    assert tiny_model.bfloat16_exact(given_value.copy()).tobytes() == expected.tobytes()


def test_routing_is_neither_uniform_nor_degenerate(real: Path) -> None:
    """Per router, over inputs of unit RMS: a spread of logits, and every expert in use."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2000, 128)).astype(np.float32)
    inputs /= np.sqrt((inputs**2).mean(axis=1, keepdims=True))
    weights = tensors(real)
    for layer in (0, 12, 23):
        logits = inputs @ weights[f"model.layers.{layer}.mlp.gate.weight"].T
        assert 1.5 < logits.std() < 2.5
        ranked = np.argsort(-logits, axis=1)
        counts = np.bincount(ranked[:, :4].ravel(), minlength=60)
        shares = counts / counts.sum()
        assert counts.min() > 0
        assert 0.9 < -(shares * np.log2(shares)).sum() / math.log2(60) < 0.9999
        edge = -np.sort(-logits, axis=1)
        assert (edge[:, 3] - edge[:, 4] < 1e-5).mean() < 0.002


def test_the_same_spec_gives_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "a", SMALL)
    build(tmp_path / "b", SMALL)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert set(hashes(tmp_path / "a")) == set(tiny_model.FILES)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    build(tmp_path / "a", SMALL)
    build(tmp_path / "b", TinyMoeSpec(2, 6, 2, 64, 2, seed=1))
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert a["model.safetensors"] != b["model.safetensors"]
    assert a["tokenizer.json"] == b["tokenizer.json"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    if not any(token in text for token in tiny_model.SPECIAL_TOKENS):
        assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_and_chat(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id == tiny_model.EOS_ID
    assert tokenizer.pad_token_id == tiny_model.PAD_ID
    assert len(tokenizer) == tiny_model.VOCAB_SIZE
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(chat), skip_special_tokens=True).startswith("user")


def test_it_says_that_its_weights_are_random(real: Path) -> None:
    assert "random" in (real / "README.md").read_text()
    assert models.is_tiny(real)


def test_an_existing_checkpoint_is_kept_or_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moe"
    monkeypatch.setattr(tiny_model, "TinyMoeSpec", lambda: SMALL)
    tiny_model.ensure(out)
    assert "random weights" in capsys.readouterr().out
    before = (out / "config.json").stat().st_ino
    tiny_model.ensure(out)
    assert capsys.readouterr().out == ""
    assert (out / "config.json").stat().st_ino == before
    other = replace(SMALL, seed=5)
    monkeypatch.setattr(tiny_model, "TinyMoeSpec", lambda: other)
    tiny_model.ensure(out)
    assert json.loads((out / tiny_model.SPEC_FILE).read_text())["seed"] == 5
    (out / "tokenizer.json").unlink()
    assert not tiny_model.holds(out, other)
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        build(tmp_path, SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="not a folder"):
        build(tmp_path / "thesis.tex", SMALL)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "moe"
    build(out, SMALL)
    before = hashes(out)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny_model, "write_tokenizer", full)
    with pytest.raises(UserError, match="No space"):
        build(out, TinyMoeSpec(2, 6, 2, 64, 2, seed=1))
    assert hashes(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]


def test_a_python_without_the_packages_gets_one_line(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from expert_profiler import errors;"
        "from expert_profiler.run import tiny_model;"
        "sys.exit(errors.run(lambda: tiny_model.ensure(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(tmp_path / "moe")],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
