"""The commands as a shell script that a person can read, and run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from ...db.models import Run
from ...terms import Stage
from .facts import Step

WIDE = 96
_OF_RUN = "--run="
_NUMBER = """number() {
  python3 -c 'import json, sys
found = json.load(sys.stdin)
print((found[0] if isinstance(found, list) else found)["run_id"])'
}"""
"""Prints the number of a run from the JSON of the command that made it."""


def script_of(
    run: Run, steps: Sequence[Step], packages: Mapping[str, str], python: str | None
) -> str:
    """Return the script. What a run is called in the store it runs in, it finds out itself."""
    lines = ["#!/bin/sh"]
    lines += _comment(f"Redoes run {run.id} ({run.stage.value}) of {run.started_at:%Y-%m-%d} UTC,")
    lines += _comment("and all that it relies on. In a new store: cellstore init redone, then")
    lines += _comment("export CELLSTORE_STORE=redone. In the store itself nothing is done twice.")
    lines += ["set -eu", "", *_versions(run, packages, python)]
    needed = {step.run_id: f"run_{step.run_id}" for step in steps if step.stage == Stage.TRAIN}
    if needed:
        lines += ["", _NUMBER]
    for number, step in enumerate(steps, start=1):
        lines += ["", *_step(number, step, run, needed)]
    return "\n".join(lines) + "\n"


def _versions(run: Run, packages: Mapping[str, str], python: str | None) -> list[str]:
    commit = re.search(r"\+g([0-9a-f]+)", run.code_version)
    wanted = {"cellstore": run.code_version.partition("+")[0], **packages}
    pins = [shlex.quote(f"{name}=={version}") for name, version in wanted.items()]
    lines = _comment(f"Versions: Python {python or 'unknown'}, cellstore {run.code_version}")
    lines += _comment("pip install " + " ".join(pins))
    if commit:
        lines += _comment(f"From a checkout of its source: git checkout {commit[1]}")
    return lines


def _step(number: int, step: Step, run: Run, needed: Mapping[int, str]) -> list[str]:
    lines = _comment(f"{number}. {step.stage}, run {step.run_id}, recipe {step.fingerprint[:16]}")
    if step.code_version != run.code_version:
        lines += _comment(f"made by cellstore {step.code_version}")
    if step.weights_sha256 and step.stage in (Stage.SEGMENT, Stage.TRAIN):
        lines += _comment(f"weights with sha256 {step.weights_sha256}")
    for table in step.tables:
        lines += _comment(f"reads {table.name}, sha256 {table.sha256}, as {table.layout}")
    for doubt in step.doubts:
        lines += _comment(f"Mind: {doubt}")
    if not step.words:
        return lines
    command = _command(step.words, needed)
    if step.run_id in needed:
        return [*lines, f"{needed[step.run_id]}=$({command} --json | number)"]
    return [*lines, command]


def _command(words: Sequence[str], needed: Mapping[int, str]) -> str:
    """The command over as many lines as it needs."""
    shown = ["cellstore", *(_word(word, needed) for word in words)]
    lines = [shown[0]]
    for word in shown[1:]:
        if len(lines[-1]) + len(word) > WIDE and not lines[-1].endswith("cellstore"):
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _word(word: str, needed: Mapping[int, str]) -> str:
    run = word.removeprefix(_OF_RUN)
    if word.startswith(_OF_RUN) and run.isdecimal() and int(run) in needed:
        return f'{_OF_RUN}"${needed[int(run)]}"'
    return shlex.quote(word)


def _comment(text: str) -> list[str]:
    """A comment of one line, whatever is in ``text``."""
    return ["# " + "".join(char if char.isprintable() else " " for char in text)]
