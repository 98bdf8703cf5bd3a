"""MViTv2 for video: train, evaluate and use it.

import mvit_video as mv

model = mv.create_model("mvitv2_s_16x4", num_classes=400)
logits = model(clips)  # float (B, 3, T, H, W) -> (B, 400)
"""

import importlib
import os
import re
from typing import Any

# Threads of OpenMP that wait for work spin for milliseconds by default, which starves those that decode
# beside them; if they sleep at once, waking them for the next operation takes a quarter of the model's time.
# Some tens of microseconds bridge two operations. It counts where torch isn't loaded yet.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Each name's module, and its name there: as the stub beside this file tells type checkers.
with open(f"{__file__}i", encoding="utf-8") as _stub:  # noqa: PTH123 - importing pathlib takes milliseconds
    _LINES = re.findall(r"^from (\S+) import (\S+) as (\w+)", _stub.read(), re.MULTILINE)
_HOMES = {name: (home, there) for home, there, name in _LINES}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports what is first used, so that what a script doesn't need costs it nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, there = _HOMES[name]
    value = globals()[name] = getattr(importlib.import_module(home), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
