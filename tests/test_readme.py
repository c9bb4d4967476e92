"""README tells the truth: its commands parse, its files exist, its keys and names are real."""

import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import selfsup_ray as ssr
from selfsup_ray import cli
from selfsup_ray.config import _configs_at, load
from selfsup_ray.experiment import Experiment
from selfsup_ray.stages import STAGES
from selfsup_ray.sweeping import prepared

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def own_commands() -> list[str]:
    """Return every line of a shell block from `selfsup-ray` on."""
    lines = [line for block in blocks("(?:bash|sh|shell)") for line in block.splitlines()]
    found = [re.search(r"selfsup-ray (run|plan|sweep|report) .*", line) for line in lines]
    return [match[0] for match in found if match]


def test_the_two_commands_are_there_as_they_were_agreed():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    install = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert f"{install} . && .venv/bin/selfsup-ray run experiments/quickstart.yaml" in lines
    tests = [line for line in lines if f"{install} '.[dev]'" in line]
    assert len(tests) == 1 and tests[0].endswith(".venv/bin/pytest")
    assert tests[0] in (ROOT / ".ci" / "run").read_text(), "CI runs what a developer runs"


@pytest.mark.parametrize("command", own_commands())
def test_a_command_parses_and_its_keys_exist(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    options = cli.parsed(shlex.split(command)[1:])
    if hasattr(options, "experiment") and (ROOT / options.experiment).exists():
        assert load(Experiment, options.experiment, dict(options.changes)).stages
    elif hasattr(options, "sweep"):
        made, _ = prepared(options.sweep, dict(options.changes))
        assert made.space


def test_there_are_commands_to_check():
    assert len(own_commands()) >= 5


def test_every_experiment_named_exists():
    for name in re.findall(r"experiments/[\w./-]+\.yaml", README):
        assert (ROOT / name).exists(), name


def test_every_dotted_key_in_the_text_is_a_key_of_an_experiment():
    keys = re.findall(rf"`((?:{'|'.join(STAGES)})\.[a-z_.]+)`", README)
    for key in keys:
        *above, last = key.split(".")
        here = _configs_at(Experiment, above)
        assert any(last == f.name for c in here for f in dataclasses.fields(c)), key


def test_every_yaml_block_is_valid():
    for block in blocks("yaml"):
        values = yaml.safe_load(block)
        keys = {field.name for field in dataclasses.fields(Experiment)}
        assert isinstance(values, dict) and values.keys() <= keys, block


def calls(tree: ast.AST) -> list[tuple[str, list[ast.expr], list[ast.keyword]]]:
    """Return (public name, arguments, keywords) of every call `ssr.name(…)`."""
    return [
        (node.func.attr, node.args, node.keywords)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "ssr"
    ]


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_calls_public_names_with_arguments_they_take(block: str):
    for name, arguments, keywords in calls(ast.parse(block)):
        assert name in ssr.__all__, name
        called: Any = getattr(ssr, name)
        given = {str(keyword.arg): None for keyword in keywords}
        if dataclasses.is_dataclass(called):
            assert given.keys() <= {field.name for field in dataclasses.fields(called)}, name
        else:
            inspect.signature(called).bind(*arguments, **given)


def test_every_public_name_can_be_imported_and_is_typed():
    for name in ssr.__all__:
        assert getattr(ssr, name) is not None
    typed = ast.parse((ROOT / "selfsup_ray" / "__init__.py").read_text())
    names = {
        alias.asname or alias.name
        for node in ast.walk(typed)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(ssr.__all__) <= names
    with pytest.raises(AttributeError, match="no attribute 'ingests'"):
        _ = ssr.ingests


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".txt", ".cfg", ""}
    return [path for name in names if (path := ROOT / name).suffix in suffixes and path.is_file()]


def test_no_file_names_a_machines_folder_or_a_package_registry():
    folders = "|".join(["work", "farm", "root", r"home/\w+", r"tmp/[a-z]"])
    hosts = "|".join(
        ["py" + r"pi\.org", "python" + "hosted", "registry." + "npmjs", "deb." + "debian"]
    )
    bad = re.compile(rf"(?<![\w.~])/(?:{folders})/|{hosts}", re.I)
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if bad.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_is_public_without_further_imports():
    assert ssr.ops.losses.nt_xent.__module__ == "selfsup_ray.ops.losses"
    with pytest.raises(AttributeError, match="no attribute 'loss'"):
        _ = ssr.ops.loss
