"""What FFmpeg says of damage while another library decodes with it.

torchcodec and decord return pictures that FFmpeg patched up, and drop its messages. These go through a
callback of libavutil, which is heard here. They don't say which file is meant, so a complaint is a reason to
look again, no verdict.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from pathlib import Path

_ERROR = 16  # FFmpeg's level; what is lower is worse
_PATCHED = b"concealing"  # said as mere information
_MAPS = Path("/proc/self/maps")  # libraries in use; Linux has it

_heard = 0


def number_heard() -> int:
    """Complaints so far, of all files and threads."""
    return _heard


@functools.cache
def listen(engine: str) -> bool:
    """Whether the FFmpeg of an engine, which has been imported, can be heard from now on."""
    if not _MAPS.exists():
        return False
    lines = [line.split(maxsplit=5) for line in _MAPS.read_text().splitlines() if "libavutil" in line]
    paths = {line[5] for line in lines if len(line) == 6}
    libraries = [ctypes.CDLL(path) for path in paths if "av.libs" not in path]  # PyAV hears its own
    for library in libraries:
        library.av_log_set_callback(_callback)
        # Decoders that outlive the interpreter must not call it.
        atexit.register(library.av_log_set_callback, library.av_log_default_callback)
    return bool(libraries)


def _hear(context: int, level: int, text: bytes, values: int) -> None:
    global _heard
    if level & 0xFF <= _ERROR or text.startswith(_PATCHED):
        _heard += 1


_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_hear)
