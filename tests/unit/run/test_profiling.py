"""Everything that can be wrong is one line, said before a model is loaded, and leaves nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_profiler import errors
from expert_profiler.commands import profile
from expert_profiler.patch import patch_state
from expert_profiler.run import machine, models, passes, profiling, tiny_model

MOE = {"num_hidden_layers": 24, "num_experts": 60, "max_position_embeddings": 2048}


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a patched vLLM were installed; loading a model would fail the test."""
    monkeypatch.setattr(patch_state, "inspect", lambda: SimpleNamespace(ok=True, message=""))
    monkeypatch.setattr(machine, "gpus", list)

    def loaded(*_: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(passes, "measure", loaded)


def checkpoint(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run with ``argv``; returns the one line on stderr."""
    assert errors.run(lambda: profile.main(list(argv))) == errors.EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("model", ["tiny", "org/moe"])
@pytest.mark.usefixtures("patched")
def test_the_random_checkpoint_is_built_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    built: list[Path] = []

    def build(folder: Path, *_: Any, **__: Any) -> None:
        built.append(folder)
        checkpoint(folder, MOE)

    tiny = replace(models.PRESETS["tiny"], model=str(tmp_path / "tiny"))
    monkeypatch.setitem(models.PRESETS, "tiny", tiny)
    monkeypatch.setattr(tiny_model, "build", build)
    with pytest.raises(AssertionError, match="the engine was started"):
        profile.main(["--model", model, "--out", str(tmp_path / "out")])
    assert built == ([tmp_path / "tiny"] if model == "tiny" else [])


@pytest.mark.usefixtures("patched")
class TestBadInput:
    def test_existing_artifacts_are_not_overwritten(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "timing.json").write_text("mine")
        message = refused(capsys, "--out", str(tmp_path))
        assert "timing.json" in message
        assert "--force" in message
        assert (tmp_path / "timing.json").read_text() == "mine"

    def test_no_log_mode_does_not_mind_an_old_log(self, tmp_path: Path) -> None:
        (tmp_path / "moe_routes.jsonl").write_text("old")
        model = checkpoint(tmp_path / "moe", MOE)
        with pytest.raises(AssertionError, match="the engine was started"):
            profile.main(["--mode", "no_log", "--model", model, "--out", str(tmp_path)])

    def test_an_artifact_that_is_a_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "moe_routes.jsonl").mkdir()
        assert "is a folder" in refused(capsys, "--out", str(tmp_path), "--force")

    def test_an_out_that_is_a_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        assert "can't be made a folder" in refused(capsys, "--out", str(tmp_path / "file"))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_an_out_that_is_not_writable(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tmp_path.chmod(0o500)
        assert "not writable" in refused(capsys, "--out", str(tmp_path))

    def test_a_missing_model_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = refused(capsys, "--model", str(tmp_path / "none"), "--out", str(tmp_path))
        assert "does not exist" in message

    def test_a_model_folder_without_config(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty").mkdir()
        message = refused(capsys, "--model", str(tmp_path / "empty"), "--out", str(tmp_path))
        assert "no config.json" in message

    def test_a_config_that_is_not_json(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = checkpoint(tmp_path / "bad", {})
        (tmp_path / "bad" / "config.json").write_text("{")
        assert "is not JSON" in refused(capsys, "--model", model, "--out", str(tmp_path))

    def test_a_dense_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = checkpoint(tmp_path / "dense", {"num_hidden_layers": 24})
        assert "dense model" in refused(capsys, "--model", model, "--out", str(tmp_path))

    @pytest.mark.parametrize("layers", ["24", "0,3-24"])
    def test_a_layer_that_the_model_lacks(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: str
    ) -> None:
        model = checkpoint(tmp_path / "moe", MOE)
        message = refused(capsys, "--model", model, "--out", str(tmp_path), "--layers", layers)
        assert "layer 24 is not in" in message
        assert "0 to 23" in message

    @pytest.mark.parametrize("layers", ["", "x", "1,", "5-3", "1-2-3", "-1"])
    def test_a_selection_that_is_none(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: str
    ) -> None:
        model = checkpoint(tmp_path / "moe", MOE)
        argv = ["--model", model, "--out", str(tmp_path), f"--layers={layers}"]
        assert "no selection of layers" in refused(capsys, *argv)

    @pytest.mark.parametrize("text", [None, "", "\n\n---\n\n"])
    def test_a_missing_or_empty_prompts_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None
    ) -> None:
        model, file = checkpoint(tmp_path / "moe", MOE), tmp_path / "p.txt"
        if text is not None:
            file.write_text(text)
        argv = ["--model", model, "--out", str(tmp_path), "--prompts", str(file)]
        assert str(file) in refused(capsys, *argv)

    def test_full_precision_without_a_gpu(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = refused(capsys, "--model", "full", "--out", str(tmp_path))
        assert "26.7 GiB for weights" in message
        assert "--model gptq" in message

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path) -> None:
        model, out = checkpoint(tmp_path / "moe", MOE), tmp_path / "out"
        with pytest.raises(AssertionError, match="the engine was started"):
            profile.main(["--model", model, "--out", str(out)])
        assert list(out.iterdir()) == []


def test_an_unpatched_vllm_is_named_with_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "vllm in /x is not patched; run: ./apply_patch.sh"
    monkeypatch.setattr(patch_state, "inspect", lambda: SimpleNamespace(ok=False, message=said))
    assert refused(capsys, "--out", str(tmp_path)) == f"error: {said}"


def test_a_checkpoint_below_this_folder_goes_by_its_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert profiling.short_path(str(tmp_path / ".cache" / "tiny")) == ".cache/tiny"
    assert profiling.short_path("/elsewhere/tiny") == "/elsewhere/tiny"
    assert profiling.short_path("Qwen/some-moe") == "Qwen/some-moe"
