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


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("datasets/*/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = (ROOT / "pyproject.toml").read_text()
    for command in set(re.findall(r"\bmvit-[a-z]+\b", text)):
        assert f"{command} = " in scripts or f'"{command}"' in scripts, command
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_page_is_linked_from_the_front() -> None:
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "benchmarks/README.md"]:
        assert f"({page.relative_to(ROOT)})" in front, page


def test_figures_are_those_of_the_benchmarks() -> None:
    told = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    measured = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    figures = re.findall(r"\d+\.\d+(?=,| s\b| GB\b)", told) + re.findall(
        r"^\| (?:h264|vp9).*\| ([\d.]+) \|", told, re.M
    )
    assert len(figures) > 15
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){figure}(?![\d.])", measured)] == []
