"""mvit-info: the published counts of the models, and an honest account of the machine."""

import pytest
from conftest import Command


@pytest.mark.parametrize(
    ("model", "parameters", "gmacs"),
    [
        ("mvitv2_s_16x4", "34,537,744", "64.46"),
        ("mvitv2_b_32x3", "51,230,128", "225.17"),
        ("mvitv2_l_40x3", "213,390,112", "2828.10"),
        ("mvitv2_t_224", "24,", "4.70"),
    ],
)
def test_models_are_described(command: Command, model: str, parameters: str, gmacs: str) -> None:
    shown = command("info", f"model={model}")
    assert shown.code == 0, shown.err
    assert model in shown.out
    assert parameters in shown.out
    assert f"{gmacs} GMACs a view" in shown.out


def test_overrides_count(command: Command) -> None:
    shown = command("info", "model=mvitv2_s_16x4", "model.num_frames=8", "model.crop_size=112")
    assert "4x28x28" in shown.out


def test_the_system_is_described(command: Command) -> None:
    shown = command("info", "system")
    assert shown.code == 0, shown.err
    for word in ("PyTorch", "PyAV", "torchcodec", "decord", "h264", "GPU"):
        assert word in shown.out
