"""Every command is documented, and the documents say what is."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
assert spec is not None
assert spec.loader is not None
make_commands = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_commands)

PATHS = [path for path in make_commands.paths() if path]
WANTED = """
init, ingest, refresh, relocate, segment, measure, qc, profile, hits, split create, split import,
split list, split delete, split show, split check, train, predict, votes, report,
runs, compare, audit, log, repro, seal, ask,
sql, schema, export, status, jobs, retry, cancel, finetune, export-model, verify, doctor, demo,
db upgrade, db check, rename, relabel, annotate, exclude, include, explore, napari,
undo, delete, backup, restore, log, predictions add, predictions withdraw, embeddings add, embed,
apply
"""


def test_all_commands_are_there():
    wanted = {name.strip() for name in WANTED.replace("\n", " ").split(",")}
    groups = {"split", "db", "predictions", "embeddings"}
    assert {" ".join(path) for path in PATHS} == wanted | groups


def test_the_page_of_commands_is_up_to_date():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == make_commands.page(), "Make it anew with: make docs"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_help_with_an_example(cellstore, path):
    said = cellstore(*path, "--help").out
    assert all(len(line) <= 88 for line in said.splitlines())
    if path[0] not in ("split", "db", "predictions", "embeddings") or len(path) > 1:
        assert f"cellstore {' '.join(path)}" in said.split("Example:")[1]
        described = said.split("Options:")[1]
        for option in re.findall(r"^  (--[a-z-]+).*$", described, re.MULTILINE):
            assert re.search(rf"{option}\b.*(\n {{6,}})?\S", described), option


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_is_in_the_guides(path):
    guides = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(
        guide.read_text(encoding="utf-8") for guide in guides if guide.name != "commands.md"
    )
    assert f"cellstore {' '.join(path)}" in text


def test_what_the_guides_tell_to_type_exists():
    known = {" ".join(path) for path in PATHS}
    for guide in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        if guide.name == "commands.md":
            continue
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", guide.read_text(encoding="utf-8"), re.S)
        for line in re.findall(r"^cellstore (.*)$", "\n".join(blocks), re.MULTILINE):
            words = [word for word in line.split() if word != "--store"]
            assert words[0] in known or " ".join(words[:2]) in known, (guide.name, line)


def test_the_changelog_names_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_package_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {"cellstore_cli", "cellstore.migrations", "cellstore.migrations.versions"}
    for init in (ROOT / "cellstore").rglob("__init__.py"):
        packages.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == packages
