"""--help: every option of the command with its default and comment, the groups that it has, in 80 columns."""

from __future__ import annotations

import pytest
from conftest import Command

from mvit_video.cli.conf import CONF_DIR, groups, options, read
from mvit_video.cli.main import JOBS


@pytest.mark.parametrize("name", JOBS)
def test_help_shows_all_that_a_command_has(command: Command, name: str) -> None:
    shown = command(name, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert f"Usage: mvit-{name} " in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    words = shown.out.split()
    for key, default, meaning in read(CONF_DIR / f"{name}.yaml")[1]:
        (line,) = [line for line in shown.out.splitlines() if line.startswith(f"  {key}=")]
        shown_default = line.split()[0].partition("=")[2]
        assert default in ("???", shown_default) or default.startswith("[") or float(default)
        assert set(meaning.split()) <= set(words)
    found = {
        line.split(":")[0].strip() for line in shown.out.splitlines() if line[:3].strip() and ": " in line
    }
    assert set(groups(name)) <= found
    assert not found & ({folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()} - set(groups(name)))
    for group in groups(name):
        assert {f"{option}," for option in options(group)[:-1]} <= set(words), group
    assert "_fields" not in shown.out
    assert "Examples" in shown.out


def test_help_follows_the_choices(command: Command) -> None:
    shown = command("train", "data=csv", "experiment=motion", "--help").out
    assert "data.train=(needed)" in shown
    assert "data.train" not in command("train", "--help").out
    assert "trainer.max_epochs=12 " in f"{shown} ".replace("\n", " ")
    assert "data.root=null  " in shown
    assert "where relative paths start" in " ".join(shown.split())
    assert "model.mlp_ratio=null a number above 0 to 1000 or null" in " ".join(shown.split())  # no comment
    assert "model.dropout" not in command("predict", "--help").out
    assert "model.dropout=null" in command("predict", "model=mvitv2_nano_8x4", "--help").out
