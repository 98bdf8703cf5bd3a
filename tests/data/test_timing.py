"""profile=true: the seconds of each stage add up, whoever does the work, and cost nothing otherwise."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from conftest import Command

from mvit_video.data import timing


def test_stages_are_exclusive_and_add_up() -> None:
    @timing.stage("inner")
    def inner() -> None:
        time.sleep(0.02)

    start = time.perf_counter()
    with timing.measured("rest") as clock:
        time.sleep(0.01)
        with timing.stage("outer"):
            time.sleep(0.01)
            inner()
            time.sleep(0.01)
    whole = time.perf_counter() - start
    assert clock.seconds["inner"] >= 0.02
    assert clock.seconds["outer"] >= 0.02
    assert clock.seconds["rest"] >= 0.01
    assert sum(clock.seconds.values()) == pytest.approx(whole, abs=2e-3)
    assert timing.clock() is None


def test_other_threads_are_not_measured() -> None:
    seen = []

    def work() -> None:
        seen.append(timing.clock())
        with timing.stage("other"):
            pass

    with timing.measured("rest") as clock:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [None]
    assert "other" not in clock.seconds


def test_an_exception_ends_its_stage() -> None:
    with timing.measured("rest") as clock:
        with pytest.raises(ZeroDivisionError), timing.stage("bad"):
            raise ZeroDivisionError
        time.sleep(0.01)
    assert clock.seconds["rest"] >= 0.01


@pytest.mark.parametrize(
    "loading",
    [
        ["num_workers=0"],
        pytest.param(["num_workers=2", "loader=workers"], marks=pytest.mark.slow),
        pytest.param(["num_workers=2", "loader=threads"], marks=pytest.mark.slow),
    ],
)
def test_a_profiled_run_says_where_the_time_went(
    command: Command, two_classes: Path, tmp_path: Path, loading: list[str]
) -> None:
    recipe = ["experiment=motion", f"data.root={two_classes}", "trainer.max_epochs=1", "batch_size=2"]
    start = time.perf_counter()
    result = command("train", *recipe, "profile=true", "hydra.run.dir=run", *loading)
    whole = time.perf_counter() - start
    assert result.code == 0, result.err
    assert "where the time went" in result.out
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert found["verdict"].split()[0] in result.out
    assert set(found["loader"]) == {"demux", "decode", "convert", "transform"}
    assert all(seconds > 0 for seconds in found["loader"].values())
    assert found["main"]["model"] > 0
    assert found["main"]["wait for data"] > 0
    assert sum(found["main"].values()) <= whole
    assert found["videos"] == (None if loading == ["num_workers=0"] else 12)  # ten, and two of validation


def test_a_profiled_evaluation(command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = command(
        "eval", f"data.root={two_classes}", f"weights={checkpoint}", "profile=true", "hydra.run.dir=run"
    )
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert found["videos"] == 2
    assert found["main"]["model"] > 0
    assert found["loader"]["decode"] > 0
