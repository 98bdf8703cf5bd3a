"""Figures that are drawn on no screen and saved as PNG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mvit_video.io.writing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def new_figure(
    path: Path, size: tuple[float, float], dpi: int = 110, *, keep: bool = False
) -> Iterator[Figure]:
    """A figure of a size in inches that is written when the block ends well; names in it may hold a "$".

    Args:
        keep: see ``replacing``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with replacing(path, keep=keep) as file:
            figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
