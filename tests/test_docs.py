"""The documentation says what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs/make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_configuration(generator) -> None:
    assert generator.TARGET.read_text(encoding="utf-8") == generator.page(ROOT / "conf"), "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_is_in_the_reference(generator, path: Path) -> None:
    def leaves(node: object, above: str = "") -> set[str]:
        if not isinstance(node, dict) or not node:
            return {above}
        return {leaf for key, value in node.items() for leaf in leaves(value, f"{above}.{key}".lstrip("."))}

    content = yaml.safe_load(path.read_text()) or {}
    expected = leaves({k: v for k, v in content.items() if k not in ("defaults", "hydra")}) - {""}
    _, values = generator.read(path)
    assert {value.key for value in values} == expected
    assert all(value.default for value in values)


def test_commands_of_the_readme_exist_and_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    scripts = (ROOT / "pyproject.toml").read_text()
    for command in set(re.findall(r"\bmvit-[a-z]+\b", text)):
        assert f"{command} = " in scripts or f'"{command}"' in scripts, command
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
