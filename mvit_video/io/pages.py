"""HTML pages that need no other file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from mvit_video.io.writing import replacing


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """The address of something that is held in the page itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def write_page(template: Path, path: Path, **values: Any) -> None:
    """Fill in a Jinja template that extends ``page.html``; what is no HTML in values is escaped."""
    import jinja2
    import markupsafe

    here = Path(__file__).parent
    style = markupsafe.Markup((here / "page.css").read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template(template.name)
    with replacing(path, "w", errors="replace") as file:
        file.write(page.render(style=style, **values))
