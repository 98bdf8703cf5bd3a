"""The Dockerfile is read, not built: what it copies, installs and starts is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Pairs such as ("COPY", "conf conf"), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def all_of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for found, rest in instructions if found == name]


def test_it_copies_all_that_the_wheel_is_made_of(instructions: list[tuple[str, str]]) -> None:
    copied = [source for rest in all_of(instructions, "COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^(?:readme|license-files|packages) = \[?"([^"]+)"\]?$', project, re.M)
    named += re.findall(r'force-include\]\n"([^"]+)" = ', project)
    assert len(named) == 4
    assert set(copied) == {"pyproject.toml", *named}


def test_it_installs_the_page_before_it_gives_up_its_rights(instructions: list[tuple[str, str]]) -> None:
    (user,) = all_of(instructions, "USER")
    assert user not in ("root", "0")
    (setup,) = all_of(instructions, "RUN")
    assert re.search(rf"useradd .*\b{user}\b", setup)
    assert re.search(r'pip install [^&]*"\.\[demo\]"', setup)
    assert instructions.index(("RUN", setup)) < instructions.index(("USER", user))
    python = re.fullmatch(r"python:(\d+\.\d+)-slim", all_of(instructions, "FROM")[0])
    assert python is not None
    assert python[1] == "3.11"  # what the tests run on


def test_what_it_starts_is_a_command_with_these_settings(
    command: Command, instructions: list[tuple[str, str]]
) -> None:
    entry, arguments = (json.loads(all_of(instructions, name)[0]) for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "mvit-demo"
    result = command("demo", *entry[1:], *arguments, "--cfg", "job")
    assert result.code == 0, result.err
    assert "host: 0.0.0.0\n" in result.out
    (port,) = all_of(instructions, "EXPOSE")
    assert f"port: {port}\n" in result.out


def test_it_is_run_as_the_documentation_says(instructions: list[tuple[str, str]]) -> None:
    page = (ROOT / "docs/prediction.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^docker run .*$", page, re.M)
    words = shlex.split(line)
    (port,) = all_of(instructions, "EXPOSE")
    assert words[words.index("--publish") + 1].endswith(f":{port}")
    folder = words[words.index("--volume") + 1].split(":")[1]
    (default,) = json.loads(all_of(instructions, "CMD")[0])
    assert default.startswith(f"weights={folder}/")
    assert words[-1] == default
