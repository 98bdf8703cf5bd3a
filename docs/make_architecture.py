"""Draws docs/architecture.svg from the imports in mvit_video/: a box a package, arrows to what it imports."""

from __future__ import annotations

import ast
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "architecture.svg"
_BOX, _HEIGHT, _SPACE, _GAP = 250, 96, 36, 64  # pixels

_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">
<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0 10 5 0 10z" fill="#57606a"/></marker></defs>
<rect width="{width}" height="{height}" fill="#ffffff"/>"""


def imports(package: Path) -> dict[str, set[str]]:
    """The packages (and the module errors) and which others each imports from."""
    layers = {path.parent.name for path in package.glob("*/__init__.py")} | {"errors"}
    found: dict[str, set[str]] = {layer: set() for layer in layers}
    for file in package.rglob("*.py"):
        layer = file.relative_to(package).parts[0].removesuffix(".py")
        if layer not in layers or file.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parts = [name.split(".") for name in names if name.startswith(f"{package.name}.")]
            found[layer] |= {part[1] for part in parts} & layers - {layer}
    return found


def levels(found: dict[str, set[str]]) -> list[list[str]]:
    """Layers from the ground up, each above what it imports from; ValueError where imports go in a circle."""
    placed: list[list[str]] = []
    below: set[str] = set()
    while len(below) < len(found):
        level = sorted(layer for layer in found.keys() - below if found[layer] <= below)
        if not level:
            raise ValueError(f"imports in a circle: {sorted(found.keys() - below)}")
        placed.append(level)
        below |= set(level)
    return placed


def _direct(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Layers and what they import from, without what is seen through another one: the arrows that say all."""
    return [
        (layer, other)
        for layer, others in sorted(found.items())
        for other in sorted(others)
        if not any(other in found[via] for via in others)
    ]


def picture(package: Path) -> str:
    """The drawing as SVG."""
    found = imports(package)
    rows = levels(found)
    arrows = _direct(found)
    width, height = max(map(len, rows)) * (_BOX + _SPACE), len(rows) * (_HEIGHT + _GAP)
    place: dict[str, tuple[int, int]] = {}

    def middle(layer: str) -> float:
        """Where what a package imports lies (x), so that its arrows are short."""
        below = [place[other][0] for above, other in arrows if above == layer]
        return sum(below) / max(len(below), 1)

    for number, row in enumerate(rows, start=1):
        for index, layer in enumerate(sorted(row, key=middle)):
            x = width * (2 * index + 1) // (2 * len(row))
            place[layer] = (x, height - number * (_HEIGHT + _GAP) + _GAP // 2)

    def port(layer: str, end: str, ends: list[str]) -> int:
        """Where an arrow meets a box (x): side by side, in the order of their other ends."""
        order = sorted(ends, key=lambda other: place[other][0])
        return place[layer][0] + _BOX * (2 * order.index(end) + 1 - len(order)) // (2 * len(order))

    parts = [_HEAD.format(width=width, height=height)]
    for layer, other in arrows:
        x = port(layer, other, [below for above, below in arrows if above == layer])
        to_x = port(other, layer, [above for above, below in arrows if below == other])
        parts.append(
            f'<line x1="{x}" y1="{place[layer][1] + _HEIGHT}" x2="{to_x}" y2="{place[other][1]}" '
            'stroke="#57606a" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    parts += [_box(package, layer, x - _BOX // 2, y) for layer, (x, y) in place.items()]
    return "\n".join([*parts, "</svg>\n"])


def _box(package: Path, layer: str, x: int, y: int) -> str:
    file = package / f"{layer}.py" if (package / f"{layer}.py").is_file() else package / layer / "__init__.py"
    about = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    box = f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_HEIGHT}" rx="8" fill="#f6f8fa" stroke="#57606a"/>'
    name = f'<text x="{x + 12}" y="{y + 24}" font-size="15" font-weight="bold" fill="#0550ae">{layer}</text>'
    lines = [
        f'<text x="{x + 12}" y="{y + 45 + 17 * number}" font-size="12" fill="#24292f">{escape(line)}</text>'
        for number, line in enumerate(textwrap.wrap(about, 36)[:3])
    ]
    return "\n".join([box, name, *lines])


if __name__ == "__main__":
    TARGET.write_text(picture(ROOT / "mvit_video"), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
