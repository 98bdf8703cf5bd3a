"""Precision and compilation of the commands: the answers stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command

from mvit_video.errors import ConfigError
from mvit_video.model import MViT, inference
from mvit_video.model.inference import multiplies_bf16, prepare
from mvit_video.weights import create_model


def evaluated(command: Command, data: Path, checkpoint: Path, *arguments: str) -> dict[str, object]:
    result = command(
        "eval",
        f"data.root={data}",
        f"weights={checkpoint}",
        "num_workers=0",
        "hydra.run.dir=run",
        *arguments,
    )
    assert result.code == 0, result.err
    return json.loads(Path("run/results.json").read_text())


@pytest.mark.parametrize("precision", ["bf16", "fp32", "auto"])
def test_answers_of_predict_do_not_depend_on_precision(
    command: Command, two_classes: Path, checkpoint: Path, precision: str
) -> None:
    answers = []
    for value in ("fp32", precision):
        output = Path(f"{value}.json")
        result = command(
            "predict", two_classes, f"weights={checkpoint}", f"precision={value}", f"output={output}"
        )
        assert result.code == 0, result.err
        answers.append(json.loads(output.read_text()))
    exact, found = (answer["videos"] for answer in answers)
    assert len(exact) == len(found) > 1
    for one, other in zip(exact, found, strict=True):
        assert one["classes"][0] == other["classes"][0]
        assert other["scores"][0] == pytest.approx(one["scores"][0], abs=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_eval_says_its_precision(
    command: Command, two_classes: Path, checkpoint: Path, precision: str
) -> None:
    results = evaluated(command, two_classes, checkpoint, f"precision={precision}")
    assert results["precision"] == {"bf16": "bfloat16", "fp32": "float32"}[precision]


def test_unknown_precision_is_one_line(command: Command, two_classes: Path, checkpoint: Path) -> None:
    result = command("predict", two_classes, f"weights={checkpoint}", "precision=fp8")
    assert result.code == 1
    assert "precision is 'fp8', expected auto or bf16 or fp32" in result.err


def test_auto_is_bf16_where_there_are_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("mvit_video.model.inference.multiplies_bf16", lambda _, answer=supported: answer)
        model = prepare(create_model("mvitv2_nano_8x4", 3), "cpu")
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert multiplies_bf16(torch.device("meta")) is False
    with pytest.raises(ConfigError, match="precision"):
        prepare(create_model("mvitv2_nano_8x4", 3), "cpu", precision="half")


@torch.inference_mode()
def test_models_in_bf16_take_float_clips() -> None:
    torch.manual_seed(0)
    model = create_model("mvitv2_nano_8x4", 3).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    exact = model(clips)
    found = prepare(model, "cpu", precision="bf16")(clips)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiled_models_give_the_same(precision: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = create_model("mvitv2_nano_8x4", 3).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    exact = prepare(model, "cpu", precision=precision)(clips).float()
    found = prepare(model, "cpu", precision=precision, compiled=True)(clips).float()
    torch.testing.assert_close(found, exact, atol=1e-5 if precision == "fp32" else 0.02, rtol=0.02)


@pytest.mark.parametrize(("eager", "compiled"), [(2.0, 1.0), (1.0, 2.0), (1.0, None)])
@pytest.mark.parametrize("training", [False, True])
def test_auto_compiles_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, eager: float, compiled: float | None, training: bool
) -> None:
    """Tried on a copy; where a compiler fails, nothing is compiled."""
    with torch.device("meta"):  # stands for a GPU
        model = create_model("mvitv2_nano_8x4", 3, stages=(1, 1), crop_size=32).train(training)
    found = iter([eager, compiled])
    seconds = inference._seconds

    def timed(module: MViT, clips: torch.Tensor) -> float:
        assert seconds(module, clips) > 0
        assert module is not model
        assert module.training == training
        assert clips.shape == (4, 3, 8, 32, 32)
        if (took := next(found)) is None:
            raise RuntimeError("no compiler")
        return took

    monkeypatch.setattr(inference, "_seconds", timed)
    monkeypatch.setattr(MViT, "compile", lambda self: None)
    assert inference.is_faster_compiled(model, 4) == (compiled is not None and compiled < eager)
    assert all(parameter.grad is None for parameter in model.parameters())
    on_cpu = create_model("mvitv2_nano_8x4", 3)
    assert not inference.is_faster_compiled(on_cpu, 4)
    assert not prepare(on_cpu, "cpu", compiled="auto").is_compiled


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_auto_compiles_on_a_gpu(training: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = create_model("mvitv2_nano_8x4", 3).cuda().train(training)
    assert inference.is_faster_compiled(model, 2) in (False, True)
    assert "compiled " in caplog.text
    assert "not compiled" not in caplog.text
