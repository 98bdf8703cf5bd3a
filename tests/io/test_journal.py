"""Journals: what was added is read back, and what a kill or a power loss has torn is left out."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from mvit_video.io.fingerprint import read_fingerprint, write_fingerprint
from mvit_video.io.journal import journal, read_journal, rewrite_journal

ENTRIES = [{"video": f"{number}.mp4", "scores": [number / 3, None]} for number in range(3)]


def test_entries_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert list(read_journal(path)) == []
    for entry in ENTRIES[:2]:
        with journal(path) as add:
            add(entry)
            assert list(read_journal(path))[-1] == entry  # at once, so that a kill costs nothing
    rewrite_journal(path, [entry for entry in read_journal(path) if entry != ENTRIES[0]])
    with journal(path) as add:
        add(ENTRIES[2])
    assert list(read_journal(path)) == ENTRIES[1:]


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_torn_lines_do_not_count(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    rewrite_journal(path, ENTRIES)
    path.write_bytes(b'\0\0\0{\n{"path": 3}\n{"crc32": 1, "stamp": {}}\n[]\n' + path.read_bytes()[:-cut])
    kept = ENTRIES if cut == 1 else ENTRIES[:2]  # all but the end of the line
    assert list(read_journal(path)) == kept
    with journal(path) as add:  # what comes next isn't torn with it
        add({})
    assert list(read_journal(path)) == [*kept, {}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space.*a\.jsonl"), journal(tmp_path / "a.jsonl"):
        pass


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_fingerprint_that_can_not_be_read_is_none(tmp_path: Path, content: bytes | None) -> None:
    about = {"weights": {"sha256": "é"}}
    write_fingerprint(tmp_path / "run.json", about)
    assert read_fingerprint(tmp_path / "run.json") == about
    if content is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_bytes(content)
    assert read_fingerprint(tmp_path / "run.json") == {}
    write_fingerprint(tmp_path / "run.json", about)  # what was there may be somebody's
    former = [path.read_bytes() for path in tmp_path.glob("*.former")]
    assert former == ([] if content is None else [content])


def test_a_line_is_the_entry_behind_its_checksum(tmp_path: Path) -> None:
    """As former versions wrote it, whose journals are taken up."""
    rewrite_journal(tmp_path / "a.jsonl", ENTRIES)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    for line, entry in zip(lines, ENTRIES, strict=True):
        crc32 = zlib.crc32(json.dumps(entry).encode())
        assert line == json.dumps({"crc32": crc32, **entry})
