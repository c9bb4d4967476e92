"""docs/ tells the truth: sizes are those of `plan`, quoted sentences printed, commands parse."""

import ast
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from selfsup_ray import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()


def printed() -> list[str]:
    """Return every text in the package, with `…` for each value that is filled in."""
    texts = []
    for path in (ROOT / "selfsup_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sd]", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts: list[Any] = node.values
                texts.append(
                    "".join(
                        getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                        for part in parts
                    )
                )
    return texts


def commands() -> list[str]:
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    found = [re.match(r"(?:\.venv/bin/)?selfsup-ray (run|plan|sweep|report) .*", s) for s in lines]
    return [match[0] for match in found if match]


def test_the_tables_of_sizing_are_those_that_plan_would_give():
    made = runpy.run_path(str(ROOT / "experiments" / "benchmarks" / "sizing.py"))
    page = (ROOT / "docs" / "sizing.md").read_text()
    assert made["with_tables"](page) == page, "run experiments/benchmarks/sizing.py --write"
    assert page.count("| **all** |") == len(made["SCALES"])


def test_every_sentence_quoted_in_troubleshooting_is_one_that_is_printed():
    quoted = re.findall(r"^### `(.+)`$", TROUBLE, flags=re.M)
    assert len(quoted) >= 10
    texts = printed()
    for sentence in quoted:
        assert any(sentence in text for text in texts), sentence


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.parsed(shlex.split(command)[1:]).call


def test_every_page_is_linked_from_the_readme_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert f"(docs/{page.name})" in readme
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
