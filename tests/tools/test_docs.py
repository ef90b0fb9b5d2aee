# SPDX-License-Identifier: Apache-2.0
"""The documents name what exists: links, commands, options, variables, fields, paths."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from expert_profiler.commands import NAMES
from expert_profiler.resources import recorder_module
from tests.support.paths import REPO

README = REPO / "README.md"
MANUAL = sorted((REPO / "docs").glob("*.md"))
DOCUMENTS = [
    README,
    *MANUAL,
    REPO / "docs" / "tour.ipynb",
    REPO / "demo_model" / "README.md",
    *(REPO / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")),
]
#: What the user guide and the submission's appendix call things: a reader of theirs finds it here.
NAMES_OF_THE_USERS_GUIDES = (
    "/configure_expert_distribution?mode=per_pass",
    "/start_expert_distribution",
    "/v1/completions",
    "/dump_expert_distribution?summary_only=true",
    "summary_only=false",
    "/stop_expert_distribution",
    "/expert_distribution_status",
    *("num_workers", "recording_mode", "num_layers", "num_experts", "num_records"),
    *("sample_record", "total_activated_experts", "avg_activated_per_layer"),
    *("expert_utilization", "batch_size", "latency", "seq_lens_sum", "forward_mode"),
    *("expert_activation", "model_id", "vllm_version", "torch_version", "device", "seed"),
    *("layers_logged", "top_k", "wall_time_sec", "tokens_generated", "tokens_per_sec"),
    *("prompts.txt", "moe_routes.jsonl", "expert_hist.png", "timing.json"),
    *("uv venv .venv", "uv pip install -r requirements-lock.txt", "./test.sh"),
    'patch -p1 --dry-run < "$REPO_DIR/vllm-v0.15.1-moe-logger.patch"',
    *("_should_log_moe_layer", "_write_moe_log_header", "_log_moe_routes"),
    "--tensor-parallel-size 4 --enforce-eager",
)
#: Where docs/log-format.md describes the records of the schema.
HEADINGS = {
    "ROUTE_FIELDS": "### Route",
    "REQUEST_KEYS": "### Request",
    "END_KEYS": "### End record",
    "PASS_KEYS": "## per_pass logs",
}


def text_of(document: Path) -> str:
    """Its Markdown."""
    text = document.read_text(encoding="utf-8")
    if document.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def prose_of(document: Path) -> str:
    """Its Markdown without code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The ids that a forge gives to the headings."""
    titles = re.findall(r"^#+ (.*)$", prose_of(document), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in plain}


def code_blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.DOTALL | re.MULTILINE)


def test_the_readme_has_at_most_200_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(document))
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_every_page_of_the_manual_is_linked_from_the_readme() -> None:
    links = set(re.findall(r"\]\(docs/([\w.-]+)", prose_of(README)))
    assert {page.name for page in MANUAL} | {"tour.ipynb"} <= links


# ---- commands ----------------------------------------------------------------------------------


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "expert_profiler", *command, "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def commands_in(text: str) -> list[tuple[str, set[str]]]:
    """(subcommand, options) of every expert-profiler command in code."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"(?:^|`)expert-profiler ([a-z]+)([^`\n#|]*)", joined, re.MULTILINE)
    return [(name, set(re.findall(r"(?<= )--[a-z-]+", rest))) for name, rest in found]


def test_every_command_and_option_that_a_document_names_exists() -> None:
    named = [pair for document in DOCUMENTS for pair in commands_in(text_of(document))]
    assert len(named) > 50
    for name, options in named:
        known = set(re.findall(r"--[a-z-]+", help_of(name)))
        assert options <= known, f"expert-profiler {name} has no {sorted(options - known)}"


def test_the_readme_names_every_command() -> None:
    assert {name for name, _ in commands_in(text_of(README))} == set(NAMES)


def test_the_configuration_has_every_option_of_profile() -> None:
    text = text_of(REPO / "docs" / "configuration.md")
    table = text[text.index("## Options of") : text.index("**Presets.**")]
    options = set(re.findall(r"--[a-z-]+", help_of("profile"))) - {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)", table)) >= options


def test_every_module_that_a_document_runs_exists() -> None:
    ours = r"python3? -m ((?:benchmarks|expert_profiler|tests)[\w.]*)"
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # it names the commands of earlier versions
            continue
        for name in re.findall(ours, text_of(document)):
            path = REPO.joinpath(*name.split("."))
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("page", ["analysis.md", "log-format.md"])
def test_the_python_examples_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    blocks = code_blocks(REPO / "docs" / page, "python")
    assert blocks
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, page, "exec"), {})  # noqa: S102 - the repository's own example
        assert out.getvalue()


# ---- names -------------------------------------------------------------------------------------


def test_the_configuration_has_every_variable_and_no_other() -> None:
    tree = ast.parse((REPO / "overlay/vllm/moe_routes/config.py").read_text(encoding="utf-8"))
    [variables] = [
        {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "VARIABLES"
        and isinstance(node.value, ast.Dict)
    ]
    assert len(variables) > 10
    configuration = text_of(REPO / "docs" / "configuration.md")
    rows = set(re.findall(r"^\| `(VLLM_LOG_MOE\w*)` \|", configuration, re.MULTILINE))
    assert rows == variables
    for document in DOCUMENTS:
        assert set(re.findall(r"VLLM_LOG_MOE\w*", text_of(document))) <= variables, document


def fields_under(heading: str) -> set[str]:
    """The names in the first column of the first table under a heading of the log format."""
    text = text_of(REPO / "docs" / "log-format.md")
    section = text[text.index(f"\n{heading}\n") :]
    [table] = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[:1]
    first_column = [row.split("|")[1] for row in table.splitlines()]
    return set(re.findall(r"`(\w+)`", "".join(first_column)))


def test_the_log_format_has_every_field_of_a_record_and_no_other() -> None:
    schema = recorder_module("schema")
    records = {
        name: {getattr(field, "name", field) for field in fields} | {"type"}
        for name, fields in vars(schema).items()
        if name.endswith(("_FIELDS", "_KEYS"))
    }
    assert "ROUTE_FIELDS" in records
    for name, fields in records.items():
        assert fields_under(HEADINGS[name]) == fields, name
    text = text_of(REPO / "docs" / "log-format.md")
    labels = {*schema.PHASES, *schema.FLAGS, *schema.FORWARD_MODES}
    assert labels <= set(re.findall(r"`(\w+)`", text))


def test_every_file_that_a_document_names_exists() -> None:
    top = "demo_model|docs|expert_profiler|overlay|requirements|tests|tools"
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # it names files of earlier versions
            continue
        for name in re.findall(rf"`((?:{top})/[\w./-]*)`", prose_of(document)):
            assert (REPO / name).exists(), f"{document.name}: {name}"


def test_the_names_of_the_users_guides_are_found() -> None:
    text = "".join(map(text_of, [README, *MANUAL]))
    assert [name for name in NAMES_OF_THE_USERS_GUIDES if name not in text] == []
