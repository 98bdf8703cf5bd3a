from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout

from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import differences, file_sha256, file_stamp, fingerprint, require_same
from mvit_video.io.writing import (
    append,
    keep_former,
    keep_whole_lines,
    remove_unfinished,
    replacing,
    set_aside,
    sole_writer,
)


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path, "w") as file:
        file.write(b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["answers.json"]
    with replacing(path, "w") as file:
        file.write("é")
    assert path.read_bytes() == "é".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["answers.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, number: int) -> None:
    path = tmp_path / "answers.json"
    with pytest.raises(OSError, match=r"answers\.json") as caught, replacing(path):
        raise OSError(number, os.strerror(number))
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_a_full_disk_is_said_where_torch_hides_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"weights\.pth") as caught, replacing(path) as file:
            torch.save({"weight": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError, match="another"), replacing(path):
        raise RuntimeError("another reason")
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_a_missing_folder_is_made_and_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b.txt", "w") as file:
        file.write("text")
    with pytest.raises(OSError, match=r"b\.txt"), replacing(tmp_path / "a" / "b.txt" / "c"):
        pass


def test_links_pipes_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        with replacing(tmp_path / name, "w") as file:
            file.write("new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_appended_rows_are_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("a") as file:
        append(file, "1\n")
        assert path.read_text() == "1\n"


def test_a_torn_line_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for number in range(2):
        path.write_bytes(b"1\n2\n3")
        keep_whole_lines(path)
        assert path.read_bytes() == b"1\n2\n"
        assert len(list(tmp_path.glob("rows.jsonl.torn*"))) == number + 1
    keep_whole_lines(path)
    assert sorted(p.read_bytes() for p in tmp_path.glob("*.torn*")) == [b"3", b"3"]


def test_damaged_files_keep_their_content_under_other_names(tmp_path: Path) -> None:
    names = set()
    for content in ("a", "b"):
        (tmp_path / "part-0.parquet").write_text(content)
        names.add(set_aside(tmp_path / "part-0.parquet", "damaged"))
    assert {name.read_text() for name in names} == {"a", "b"}


def _try(path: Path, answers: multiprocessing.Queue[str]) -> None:
    try:
        with sole_writer(path):
            answers.put("locked")
    except ConfigError:
        answers.put("refused")


def test_one_run_at_a_time_writes(tmp_path: Path) -> None:
    path = tmp_path / "predictions"
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    with sole_writer(path):
        other = context.Process(target=_try, args=(path, answers))
        other.start()
        assert answers.get(timeout=120) == "refused"
        other.join()
    assert [p.name for p in tmp_path.iterdir()] == []
    with sole_writer(path):
        pass


def test_a_run_may_begin_as_another_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that it opened is gone when it is asked for."""
    acquire, missed = FileLock.acquire, iter("12")

    def late(self: FileLock) -> object:
        if next(missed, None):
            raise Timeout(self.lock_file)
        return acquire(self)

    monkeypatch.setattr(FileLock, "acquire", late)
    with sole_writer(tmp_path / "run"):
        assert (tmp_path / ".run.lock").exists()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mvit_video.io.writing import sole_writer\n"
        "with sole_writer(sys.argv[1]): print('locked', flush=True); time.sleep(600)"
    )
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        process.send_signal(signal.SIGKILL)
    with sole_writer(path):
        pass


def test_what_changed_is_named(tmp_path: Path) -> None:
    before = fingerprint(weights={"sha256": "a" * 64}, views=(5, 1), precision="fp32")
    now = fingerprint(weights={"sha256": "b" * 64}, views=[5, 1], precision="fp32", topk=5)
    assert differences(before, now) == {"weights.sha256": "aaaaaa... -> bbbbbb...", "topk": "(none) -> 5"}
    with pytest.raises(ConfigError, match=r"weights: sha256 aaaaaa\.\.\. -> bbbbbb\.\.\.; name another"):
        require_same(before, now, what="out.csv", remedy="name another output", free=("topk",))
    require_same(before, before, what="out.csv", remedy="name another output")


def test_a_replaced_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert file_stamp(path) == {}
    path.write_bytes(b"1")
    first = file_stamp(path)
    os.utime(path, ns=(1, 1))
    assert first["size"] == 1
    assert file_stamp(path) != first


def test_the_hash_of_several_files_is_that_of_their_contents_in_a_row(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"23"), ("c", b"123")):
        (tmp_path / name).write_bytes(content)
    assert file_sha256(tmp_path / "a", tmp_path / "b") == file_sha256(tmp_path / "c")
    assert file_sha256(tmp_path / "b", tmp_path / "a") != file_sha256(tmp_path / "c")


def test_what_a_former_run_has_left_keeps_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "file").write_text(content)
        keep_former(folder)
    keep_former(folder)  # nothing is there
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.former", "run.former.1"]
    assert (tmp_path / "run.former" / "file").read_text() == "first"


def test_what_a_killed_writer_has_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with replacing(tmp_path / "file") as file:
        (unfinished,) = set(tmp_path.iterdir()) - {tmp_path / "kept"}
        (tmp_path / unfinished.name.replace("unfinished-", "unfinished-1")).touch()
        file.write(b"x")
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "file"}


def test_a_damaged_file_can_be_hidden_from_who_reads_the_whole_folder(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "part-0.parquet").write_bytes(b"half")
        set_aside(tmp_path / "part-0.parquet", "torn", prefix="_")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["_part-0.parquet.damaged", "_part-0.parquet.damaged.1"]


def test_a_parent_that_is_a_file_is_named_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.csv"
    for context in (replacing(path), sole_writer(path)):
        with pytest.raises(NotADirectoryError) as caught, context:
            pass
        assert caught.value.filename == str(path)


def test_a_folder_that_takes_no_files_is_not_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /proc, whose files can't be made."""
    original = os.open

    def refuse(path: str, flags: int, *more: int, **options: int) -> int:
        if str(path).endswith(".lock"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return original(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(OSError, match=r"no file can be made there.*a\.json"),
        sole_writer(tmp_path / "a.json"),
    ):
        pass
