"""Files from outside: believed only where their tensors bear them out."""

from __future__ import annotations

import functools
import io
import json
import math
import reprlib
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from conftest import Command, error_line
from small_models import small_model
from torch import Tensor

import mvit_video as mv
from mvit_video.detection.export import load_maps
from mvit_video.model.baselines import Baseline, create_baseline
from mvit_video.weights import METADATA_KEY, model_metadata, save_weights
from mvit_video.weights.export import MAX_BATCH, ExportedModel, load_exported
from mvit_video.weights.pyslowfast import make_cfg

NAN = math.nan


def checkpoint(part: str, key: str, value: Any, model: Any = None) -> dict[str, Any]:
    """A checkpoint whose description says ``value`` in one place."""
    model = model or small_model()
    metadata: Any = model_metadata(model)
    if part:
        metadata[part][key] = value
    elif key:
        metadata[key] = value
    else:
        metadata = value
    return {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, METADATA_KEY: metadata}


@functools.cache
def r2plus1d() -> Baseline:
    return create_baseline("r2plus1d_18", 3, num_frames=4, crop_size=32)


def laughs() -> list[Any]:
    """A value of a few hundred bytes whose text would fill the memory."""
    value: list[Any] = ["ha"]
    for _ in range(40):
        value = [value] * 10
    return value


LIES: list[tuple[str, str, Any]] = [
    ("config", "num_classes", 10**9),
    ("config", "num_classes", 4),
    ("config", "num_classes", "3"),
    ("config", "embed_dim", 10**6),
    ("config", "embed_dim", 10**30),
    ("config", "embed_dim", 0),
    ("config", "stages", [10**6]),
    ("config", "stages", [1] * 10**5),
    ("config", "stages", "11"),
    ("config", "stages", laughs()),
    ("config", "embed_dim", laughs()),
    ("config", "mlp_ratio", 1e300),
    ("config", "mlp_ratio", math.inf),
    ("config", "mlp_ratio", NAN),
    ("config", "num_frames", 10**9),
    ("config", "crop_size", 10**6),
    ("config", "dim_mul", [[1, 1e300]]),
    ("config", "head_mul", [["a", 2.0]]),
    ("config", "patch_stride", [0, 1, 1]),
    ("config", "patch_padding", [10**9, 3, 3]),
    ("config", "patch_padding", [1.5, 3.0, 3.0]),
    ("config", "pool_kernel", None),
    ("config", "pool_kernel", [1, 4096, 4096]),
    ("config", "window", [1, 4096, 4096]),
    ("config", "name", "x3d_s"),
    ("config", "name", ["x3d_s"]),
    ("config", "unknown", 1),
    ("protocol", "num_clips", 10**9),
    ("protocol", "num_clips", 2.5),
    ("protocol", "num_clips", True),
    ("protocol", "short_side", 10**6),
    ("protocol", "crop", -1),
    ("protocol", "clip_frames", 10**9),
    ("protocol", "clip_frames", "16"),
    ("protocol", "stride", 10**9),
    ("protocol", "target_fps", NAN),
    ("protocol", "target_fps", 1e-300),
    ("protocol", "mean", [NAN, 0.0, 0.0]),
    ("protocol", "std", [math.inf, 1.0, 1.0]),
    ("protocol", "std", "abc"),
    ("protocol", "num_crops", 10**9),
    ("", "class_names", ["a", "b"]),
    ("", "class_names", "abc"),
    ("", "class_names", laughs()),
    ("", "class_names", [1, 2, 3]),
    ("", "class_names", torch.zeros(3)),
    ("", "protocol", [1, 2]),
    ("", "protocol", {"short_side": 4000, "crop": 16}),
    ("", "protocol", {"short_side": 2400, "crop": 2400, "clip_frames": 30, "num_clips": 1}),
    ("", "config", torch.zeros(2, 2)),
    ("", "", torch.zeros(2, 2)),
    ("", "", None),
    ("", "", {}),
    ("", "", "text"),
]


def shown(value: Any) -> str:
    return reprlib.repr(value)[:30]


@pytest.mark.parametrize(("part", "key", "value"), LIES, ids=shown)
def test_a_description_is_checked_before_anything_is_built(
    tmp_path: Path, part: str, key: str, value: Any
) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(checkpoint(part, key, value), path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(mv.CheckpointError, match=r"model\.ckpt: ") as caught:
        mv.load_model(path)
    assert len(str(caught.value)) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize(("part", "key", "value"), [case for case in LIES if case[0] != "config"], ids=shown)
def test_load_weights_looks_at_the_description_too(part: str, key: str, value: Any) -> None:
    model = small_model()
    with pytest.raises(mv.CheckpointError):
        mv.load_weights(model, checkpoint(part, key, value))
    assert model.class_names is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"config": ' + "9" * 5000 + "}", '"\\ud800"', "{", "{}", "[1]", "nan", "1"]
)
def test_descriptions_in_safetensors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small_model().state_dict(), path, {METADATA_KEY: text})
    with pytest.raises(mv.CheckpointError, match=r"model\.safetensors: "):
        mv.load_model(path)


def test_a_tensor_can_not_claim_more_numbers_than_it_holds(tmp_path: Path) -> None:
    content = checkpoint("config", "num_classes", 10**9)
    content["state_dict"]["model.head.projection.weight"] = torch.zeros(1, 1).expand(10**9, 16)
    content["state_dict"]["model.head.projection.bias"] = torch.zeros(1).expand(10**9)
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(mv.CheckpointError, match=r"head\.projection\.weight holds .*, expected dense"):
        mv.load_model(tmp_path / "model.ckpt")


def test_a_baseline_is_not_built_for_classes_that_a_tensor_only_claims(tmp_path: Path) -> None:
    model = r2plus1d()
    content = checkpoint("config", "num_classes", 10**9, model)
    content["state_dict"]["model.net.fc.weight"] = torch.zeros(1, 1).expand(10**9, 512)
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(mv.CheckpointError, match="num_classes"):
        mv.load_model(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("key", "value"), [("num_classes", 10**9), ("num_classes", 7), ("crop_size", 10**6), ("num_frames", 2.5)]
)
def test_descriptions_of_baselines(tmp_path: Path, key: str, value: Any) -> None:
    model = r2plus1d()
    torch.save(checkpoint("config", key, value, model), tmp_path / "model.ckpt")
    with pytest.raises(mv.CheckpointError, match=r"model\.ckpt: "):
        mv.load_model(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("MVIT", "DEPTH", 10**9),
        ("MVIT", "DEPTH", "many"),
        ("MVIT", "DEPTH", 3),
        ("MVIT", "EMBED_DIM", 10**9),
        ("MVIT", "EMBED_DIM", 0),
        ("MVIT", "DROPPATH_RATE", 2),
        ("MVIT", "PATCH_KERNEL", [7, 7]),
        ("MVIT", "DIM_MUL", 5),
        ("MVIT", "DIM_MUL", [[1, math.inf]]),
        ("MVIT", "MODE", laughs()),
        ("MVIT", "REV", ["ENABLE"]),
        ("MVIT", "EMBED_DIM", laughs()),
        ("MVIT", "UNKNOWN", laughs()),
        ("MVIT", "PATCH_KERNEL", laughs()),
        ("MVIT", "EMBED_DIM", "(" * 500),
        ("MODEL", "NUM_CLASSES", 10**9),
        ("DATA", "NUM_FRAMES", [1]),
        ("DATA", "MEAN", [NAN, 0, 0]),
        ("DATA", "TEST_CROP_SIZE", 10**9),
        ("DATA", "TRAIN_JITTER_SCALES", 3),
        ("TEST", "NUM_ENSEMBLE_VIEWS", 10**9),
        ("TEST", "NUM_SPATIAL_CROPS", "many"),
        ("TEST", "", "text"),
        ("DATA", "", [1, 2]),
        ("DETECTION", "", 3),
    ],
    ids=shown,
)
def test_official_configurations(tmp_path: Path, section: str, option: str, value: Any) -> None:
    model = small_model()
    cfg: Any = make_cfg(model.config, model.protocol)
    if option:
        cfg[section][option] = value
    else:
        cfg[section] = value
    content = {"model_state": model.state_dict(), "cfg": yaml.safe_dump(cfg)}
    torch.save(content, tmp_path / "model.pyth")
    for read in (mv.load_model, mv.from_slowfast):
        with pytest.raises(mv.CheckpointError, match=r"model\.pyth: ") as caught:
            read(tmp_path / "model.pyth")
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("option", [("MODEL", "NUM_CLASSES"), ("MVIT", "EMBED_DIM")])
def test_a_configuration_alone_is_bounded_too(tmp_path: Path, option: tuple[str, str]) -> None:
    model = small_model()
    cfg = make_cfg(model.config, model.protocol)
    cfg[option[0]][option[1]] = 10**9
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(cfg))
    with pytest.raises(mv.CheckpointError, match=r"model\.yaml: "):
        mv.from_slowfast(tmp_path / "model.yaml")


# Numbers


@pytest.mark.parametrize("number", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["norm.bias", "blocks.1.attn.rel_pos_h", "head.projection.weight"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, key: str, number: float) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_parameter(key).view(-1)[-1] = number
    for name in ("model.pyth", "model.safetensors"):
        save_weights(model, tmp_path / name)
        with pytest.raises(mv.CheckpointError, match=rf"{name}: {key} holds NaN or infinity"):
            mv.load_model(tmp_path / name)
        other = small_model()
        with pytest.raises(mv.CheckpointError, match=f"{key} holds NaN or infinity"):
            mv.load_weights(other, tmp_path / name)
        assert all(value.isfinite().all() for value in other.state_dict().values())


def test_numbers_too_large_for_the_model_are_infinite() -> None:
    weights = {key: value.double() for key, value in small_model().state_dict().items()}
    mv.load_weights(small_model(), weights)
    weights["norm.bias"][0] = 1e300
    with pytest.raises(mv.CheckpointError, match=r"norm\.bias holds NaN or infinity"):
        mv.load_weights(small_model(), weights)


def test_statistics_of_baselines_must_be_numbers() -> None:
    model = r2plus1d()
    weights = dict(model.state_dict())
    weights["net.stem.1.running_var"] = torch.full_like(weights["net.stem.1.running_var"], NAN)
    with pytest.raises(mv.CheckpointError, match=r"net\.stem\.1\.running_var holds NaN"):
        mv.load_weights(model, weights)


def test_prediction_refuses_weights_that_give_no_answers(
    command: Command, tmp_path: Path, two_classes: Path
) -> None:
    model = small_model()
    model.norm.bias.data[0] = NAN
    save_weights(model, tmp_path / "nan.ckpt")
    result = command("predict", two_classes, "weights=nan.ckpt", "output=answers.json")
    assert "norm.bias" in error_line(result, "predict")
    assert not (tmp_path / "answers.json").exists()


# Things that no one means


@pytest.mark.parametrize(
    "content",
    [
        {"model_state": {"norm.bias": torch.empty(16, device="meta")}},
        {"model_state": {"norm.bias": torch.zeros(16, dtype=torch.complex64)}},
        {"model_state": {"norm.bias": torch.quantize_per_tensor(torch.zeros(16), 1.0, 0, torch.qint8)}},
        {"model_state": {"norm.bias": torch.zeros(())}},
        {"model_state": {"head.projection.weight": torch.zeros(())}},
        {"model_state": {("a", 1): torch.zeros(1)}},
        {"model_state": {b"norm.bias": torch.zeros(16)}},
        {"model_state": torch.zeros(3)},
        {3: 4},
        {},
    ],
    ids=shown,
)
def test_odd_contents_are_one_line(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    for read in (mv.load_model, lambda path: mv.load_weights(small_model(), path), mv.from_slowfast):
        with pytest.raises(mv.CheckpointError, match=r"odd\.pt: "):
            read(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    "key", ["cls_token", "patch_embed.proj.weight", "blocks.0.attn.rel_pos_h", "blocks.0.attn.pool_q.weight"]
)
@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 8), (3, 0, 8), (2, 3), (1, 1, 1, 1, 1, 1), (1, 2, 3, 4, 5)], ids=str
)
def test_odd_shapes_are_one_line(key: str, shape: tuple[int, ...]) -> None:
    weights = small_model().state_dict() | {key: torch.zeros(shape)}
    with pytest.raises(mv.CheckpointError, match=key):
        mv.load_weights(small_model(), weights)


def test_small_types_are_cast() -> None:
    weights = {key: value.to(torch.float8_e5m2) for key, value in small_model().state_dict().items()}
    report = mv.load_weights(small_model(crop_size=32), weights)
    assert report.interpolated


def test_a_dictionary_inside_itself_ends() -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(mv.CheckpointError, match="no weights found"):
        mv.load_weights(small_model(), content)


# Exported programs


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_program_is_refused_before_it_is_opened(
    command: Command, tmp_path: Path, two_classes: Path, compiled: bool
) -> None:
    mark, path = tmp_path / "was-here", tmp_path / "model.pt2"
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/sample_inputs/model.pt", buffer.getvalue())
        archive.writestr("model/data/weights/model.pt", buffer.getvalue())
        if compiled:
            archive.writestr("model/data/aotinductor/model/x.so", b"")
    for read in (load_exported, load_maps, mv.Recognizer):
        with pytest.raises(mv.CheckpointError, match="trust=true"):
            read(path)
        with pytest.raises(mv.CheckpointError, match=r"renamed\.onnx"):
            read(shutil.copy(path, tmp_path / "renamed.onnx"))
    if not compiled:
        for name, argument in (("predict", str(two_classes)), ("eval", f"data.root={two_classes}")):
            assert "model.pt2" in error_line(command(name, argument, "weights=model.pt2"), name)
    assert not mark.exists()


# What shapes weights alone means nothing to a program.
OF_PROGRAMS = [case for case in LIES if case[0] == "protocol" or case[2] == "abc"]


@pytest.mark.parametrize(("part", "key", "value"), [*OF_PROGRAMS, ("config", "num_frames", "4")], ids=shown)
def test_descriptions_of_exported_models(part: str, key: str, value: Any) -> None:
    text = json.dumps(checkpoint(part, key, value)[METADATA_KEY])
    with pytest.raises(mv.CheckpointError, match=r"model\.onnx: "):
        ExportedModel(lambda clips: clips, text, "model.onnx")


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, "9" * 5000], ids=shown)
def test_descriptions_that_are_no_json(text: str | None) -> None:
    with pytest.raises(mv.CheckpointError, match=r"model\.onnx: "):
        ExportedModel(lambda clips: clips, text, "model.onnx")


def test_a_program_that_fails_is_one_line() -> None:
    def run(clips: Tensor) -> Tensor:
        raise AssertionError("Guard\nfailed")

    model = ExportedModel(run, json.dumps(model_metadata(small_model())), "model.onnx")
    with pytest.raises(mv.CheckpointError, match=r"model\.onnx: .*Guard failed"):
        model(torch.zeros(2, 3, 4, 16, 16))


def test_a_program_takes_more_clips_than_fit_into_its_batch() -> None:
    def run(clips: Tensor) -> Tensor:
        assert len(clips) <= MAX_BATCH
        return clips[:, :, 0, 0, 0]

    model = ExportedModel(run, json.dumps(model_metadata(small_model())), "model.pt2")
    clips = torch.rand(MAX_BATCH + 1, 3, 1, 1, 1).expand(-1, -1, 4, 16, 16)
    assert torch.equal(model(clips), clips[:, :, 0, 0, 0])


def test_a_program_that_answers_otherwise_than_it_says() -> None:
    def run(clips: Tensor) -> Tensor:
        return torch.zeros(len(clips), 7)

    model = ExportedModel(run, json.dumps(model_metadata(small_model())), "model.onnx")
    with pytest.raises(mv.CheckpointError, match=r"model\.onnx: gives \(2, 7\), its description \(2, 3\)"):
        model(torch.zeros(2, 3, 4, 16, 16))
