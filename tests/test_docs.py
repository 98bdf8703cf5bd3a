"""The documentation says what is there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from mvit_video.cli.conf import read

ROOT = Path(__file__).parents[1]


def generator_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator():
    return generator_of("make_configuration")


@pytest.fixture(scope="module")
def architecture():
    return generator_of("make_architecture")


def test_the_picture_of_the_layers_is_that_of_the_imports(architecture) -> None:
    assert architecture.TARGET.read_text(encoding="utf-8") == architecture.picture(ROOT / "mvit_video"), (
        "run `make docs`"
    )


def test_layers_that_import_in_a_circle_are_refused(architecture) -> None:
    assert architecture.levels({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == [["b"], ["a"], ["c"]]
    with pytest.raises(ValueError, match="circle"):
        architecture.levels({"a": {"b"}, "b": {"a"}})


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
    _, values = read(path)
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


def test_figures_of_models_are_those_recorded() -> None:
    told = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    records = json.loads((ROOT / "benchmarks/model.json").read_text())
    for machine, record in records.items():
        for name, row in record["eager"].items():
            cells = f"{row['share']:.2f}, {row['torchvision_share']:.2f}; {row['ratio']:.2f}x"
            assert re.search(rf"^\| {re.escape(machine)} \|.* {re.escape(cells)} \|", told, re.M), name
    record = next(iter(records.values()))
    for name, row in record["eager"].items():
        kind, dtype = name.split()
        ours, theirs = f"{row['ours']:.2f} s", f"{row['torchvision']:.2f} s"
        if kind == "training":
            memory = record["memory"][dtype]
            ours += f", {memory['ours'][0]:.2f} GB"
            theirs += f", {memory['torchvision'][0]:.2f} GB"
        assert f"| {kind}, {dtype} | {ours} | {theirs} | {row['ratio']:.1f} |" in told


def test_figures_of_decoding_are_those_of_the_benchmark() -> None:
    told = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    measured = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:h264|vp9) \S+)" + r" \| ([\d.]+)" * 5 + r" \|$", told, re.M)
    assert len(rows) == 2
    for file, *figures in rows:
        section = measured[measured.index(f"\n{file}") :]
        found = re.search(r"^\| mvit_video \(pyav\) \| (.*)", section, re.M)
        assert found is not None
        assert re.findall(r"([\d.]+) \(1\.00\)", found[1]) == figures
