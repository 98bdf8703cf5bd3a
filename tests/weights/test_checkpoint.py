"""Weights from files: every format that is read, and what is said about those that don't fit."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_models import golden, golden_input, golden_state
from small_models import small_model
from torch import Tensor

from mvit_video.errors import CheckpointError
from mvit_video.model import ClipSpec, MViT, MViTConfig
from mvit_video.weights import (
    METADATA_KEY,
    create_model,
    from_slowfast,
    load_model,
    load_weights,
    model_metadata,
)

TINY = "tiny_v2"


def lightning_like(model: MViT) -> dict[str, Any]:
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights["metrics.total"] = torch.zeros(())  # not the model's
    return {"state_dict": weights, "epoch": 3, METADATA_KEY: model_metadata(model)}


def slowfast_checkpoint(**changes: Any) -> dict[str, Any]:
    """The tiny official model as ``.pyth`` files hold it; ``changes`` as SECTION__OPTION=value."""
    cfg = copy.deepcopy(golden(TINY)["cfg"])
    for key, value in changes.items():
        section, option = key.split("__")
        cfg[section][option] = value
    return {
        "epoch": 199,
        "model_state": golden_state(TINY),
        "optimizer_state": {"state": {}, "param_groups": []},
        "cfg": yaml.safe_dump(cfg),
    }


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_same_weights(model: MViT, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def assert_tiny_logits(model: MViT) -> None:
    assert not model.training
    with torch.inference_mode():
        logits = model(golden_input(TINY))[0]
    torch.testing.assert_close(logits, torch.tensor(golden(TINY)["logits"]), atol=5e-5, rtol=0)


# What is read

FORMATS = {
    "state dict": lambda model: model.state_dict(),
    "plain dict": lambda model: dict(model.state_dict()),
    "PySlowFast": lambda model: {"model_state": model.state_dict(), "epoch": 1, "cfg": "not: read here"},
    "Lightning": lightning_like,
}


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "in memory"])
@pytest.mark.parametrize("wrap", FORMATS.values(), ids=FORMATS)
def test_load_weights_finds_the_format_out(tmp_path, wrap, from_file):
    trained, model = small_model(1), small_model(2)
    source = wrap(trained)
    load_weights(model, save(source, tmp_path / "weights.pt") if from_file else source)
    assert_same_weights(model, trained.state_dict())


def test_load_weights_takes_class_names_along():
    trained, model = small_model(1), small_model(2)
    trained.class_names = ("run", "jump", "rest")
    load_weights(model, lightning_like(trained))
    assert model.class_names == ("run", "jump", "rest")
    load_weights(model, small_model(3).state_dict())  # which doesn't know them
    assert model.class_names == ("run", "jump", "rest")


def test_load_model_round_trip(tmp_path):
    trained = small_model(1, drop_path=0.3, class_token=False)
    trained.class_names = ("run", "jump", "rest")
    trained.protocol = ClipSpec(
        clip_frames=4, stride=2, num_clips=3, num_crops=3, short_side=20, crop=16, mean=(0.1, 0.2, 0.3)
    )
    model = load_model(save(lightning_like(trained), tmp_path / "best.ckpt"))
    assert model.config == trained.config
    assert model.protocol == trained.protocol
    assert model.class_names == ("run", "jump", "rest")
    assert not model.training
    assert_same_weights(model, trained.state_dict())


def test_load_model_without_class_names(tmp_path):
    assert load_model(save(lightning_like(small_model(1)), tmp_path / "best.ckpt")).class_names is None


def test_metadata_is_plain_data():
    metadata = model_metadata(small_model())
    assert set(metadata) == {"config", "protocol", "class_names"}
    assert yaml.safe_load(yaml.safe_dump(copy_with_lists(metadata)))["config"]["stages"] == [1, 1]


def copy_with_lists(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: copy_with_lists(value) for key, value in data.items()}
    return list(data) if isinstance(data, tuple) else data


def test_slowfast_file_through_every_door(tmp_path):
    path = save(slowfast_checkpoint(), tmp_path / "checkpoint_epoch_00200.pyth")
    for model in (load_model(path), from_slowfast(path), from_slowfast(str(path))):
        assert_tiny_logits(model)
    model = MViT(load_model(path).config)
    load_weights(model, path)
    assert_tiny_logits(model.eval())


def test_slowfast_config_is_translated():
    model = from_slowfast(slowfast_checkpoint())
    assert model.config == MViTConfig(
        num_classes=5,
        num_frames=8,
        crop_size=64,
        embed_dim=32,
        num_heads=1,
        stages=(1, 2, 1),
        kv_stride=(1, 4, 4),
        drop_path=0.2,
        head_dropout=0.5,
    )
    assert model.protocol == ClipSpec(clip_frames=8, stride=8, short_side=64, crop=64)


def test_slowfast_config_as_nested_dict():
    assert_tiny_logits(from_slowfast({"model_state": golden_state(TINY), "cfg": golden(TINY)["cfg"]}))


def test_slowfast_normalisation_is_kept():
    model = from_slowfast(
        slowfast_checkpoint(DATA__MEAN=[0.485, 0.456, 0.406], DATA__STD=[0.229, 0.224, 0.225])
    )
    assert model.protocol.mean == (0.485, 0.456, 0.406)
    assert model.protocol.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(("crop", "short_side"), [(224, 256), (64, 64), (312, 312)])
def test_slowfast_test_crop_tells_the_short_side(crop, short_side):
    protocol = from_slowfast(slowfast_checkpoint(DATA__TEST_CROP_SIZE=crop)).protocol
    assert (protocol.crop, protocol.short_side) == (crop, short_side)


# What is refused: files


def half_a_file() -> bytes:
    torch.save(small_model().state_dict(), buffer := io.BytesIO())
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


NO_CHECKPOINTS = {
    "text": b"These are not the weights that you are looking for.\n",
    "page": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "nothing": b"",
    "half": half_a_file(),
}
READERS = {
    "load_model": load_model,
    "from_slowfast": from_slowfast,
    "load_weights": lambda path: load_weights(small_model(), path),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("content", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, content, read):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt: not a checkpoint file, or damaged") as e:
        read(path)
    assert "\n" not in str(e.value)


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


REFUSED = r"weights\.pt: refused, .*could run code \(\w+\.system\)$"
MALICIOUS_WRITERS = {
    "torch file": (torch.save, REFUSED),
    # Of a newer pickle protocol than torch reads: may also be taken for damage.
    "bare pickle": (
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        rf"{REFUSED}|weights\.pt: not a checkpoint file, or damaged",
    ),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("write", "message"), MALICIOUS_WRITERS.values(), ids=MALICIOUS_WRITERS)
@pytest.mark.parametrize("where", ["model_state", "cfg", METADATA_KEY])
@pytest.mark.filterwarnings("ignore")  # of torch, about the protocol
def test_code_in_a_file_is_not_run(tmp_path, where, write, message, read):
    mark = tmp_path / "was-here"
    content = slowfast_checkpoint() | {where: Malicious(f"touch {mark}")}
    path = tmp_path / "weights.pt"
    write(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path)
    assert "weights_only" not in str(caught.value)  # no dangerous advice
    assert not mark.exists()
    pickle.loads(pickle.dumps(content[where]))  # the payload itself works
    assert mark.exists()


def test_code_in_the_cfg_text_is_not_run(tmp_path):
    mark = tmp_path / "was-here"
    checkpoint = slowfast_checkpoint()
    checkpoint["cfg"] += f"EXTRA: !!python/object/apply:os.system ['touch {mark}']\n"
    with pytest.raises(CheckpointError, match="its cfg is no plain yaml"):
        load_model(save(checkpoint, tmp_path / "weights.pyth"))
    assert not mark.exists()


def test_whole_models_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"refused, .*MViT"):
        load_model(save(small_model(), tmp_path / "model.pt"))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_other_content_is_named(tmp_path, read):
    with pytest.raises(CheckpointError, match="expected a checkpoint or a state dict, found list"):
        read(save([1, 2], tmp_path / "list.pt"))


def test_load_model_of_bare_weights_asks_for_the_name(tmp_path):
    path = save(small_model().state_dict(), tmp_path / "bare.pt")
    with pytest.raises(
        CheckpointError, match=r"bare\.pt: holds weights but not which model .*model=mvitv2_s_16x4"
    ):
        load_model(path)


@pytest.mark.parametrize(
    ("keep", "said"),
    [(["cfg"], "no model_state"), (["model_state"], "no cfg"), ([], "no cfg and no model_state")],
)
def test_from_slowfast_says_what_is_absent(keep, said):
    checkpoint = {key: value for key, value in slowfast_checkpoint().items() if key in keep}
    with pytest.raises(CheckpointError, match=f"not a PySlowFast checkpoint, it has {said}$"):
        from_slowfast(checkpoint)


# What is refused: weights that don't fit


def test_missing_unexpected_and_misshapen_are_all_named():
    weights = small_model(1).state_dict()
    del weights["norm.bias"]
    weights["extra.weight"] = torch.zeros(1)
    weights["cls_token"] = torch.zeros(1, 1, 5)
    model = small_model(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match="doesn't fit the model") as caught:
        load_weights(model, weights)
    for problem in (
        "missing norm.bias",
        "unexpected extra.weight",
        "cls_token is (1, 1, 5), expected (1, 1, 8)",
    ):
        assert problem in str(caught.value)
    assert "more" not in str(caught.value)
    assert_same_weights(model, before)  # nothing is loaded by halves


def test_long_lists_of_problems_are_cut():
    weights = small_model().state_dict()
    kept = {"head.projection.weight": weights["head.projection.weight"]}
    with pytest.raises(CheckpointError, match=f"; and {len(weights) - 1 - 6} more$") as caught:
        load_weights(small_model(), kept)
    assert str(caught.value).count("missing ") == 6


def test_official_weights_in_another_model(tmp_path):
    path = save(slowfast_checkpoint(), tmp_path / "tiny.pyth")
    with pytest.raises(CheckpointError, match=r"tiny\.pyth: .*(missing|unexpected|expected) "):
        load_weights(create_model("mvitv2_nano_8x4", num_classes=5), path)


def test_slowfast_weights_that_contradict_their_cfg():
    with pytest.raises(CheckpointError, match="its head has 5 classes, the model has 6"):
        from_slowfast(slowfast_checkpoint(MODEL__NUM_CLASSES=6))
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attn\.rel_pos_h is \(31, 32\), expected \(55, 32\)"
    ):
        from_slowfast(slowfast_checkpoint(DATA__TRAIN_CROP_SIZE=112))


# What is refused: official configurations that can't be built


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("MVIT__MODE", "median"),
        ("MVIT__NORM", "batchnorm"),
        ("MVIT__USE_FIXED_SINCOS_POS", True),
        ("DATA__INPUT_CHANNEL_NUM", [3, 3]),
        ("MODEL__MODEL_NAME", "SlowFast"),
        ("MODEL__HEAD_ACT", "sigmoid"),
    ],
)
def test_option_that_cannot_be_built_is_named(option, value):
    named = option.replace("__", ".")
    with pytest.raises(CheckpointError, match=rf"{named} = .* can't be built; only .* can") as caught:
        from_slowfast(slowfast_checkpoint(**{option: value}))
    assert f"{named} = {value} " in str(caught.value)


@pytest.mark.parametrize("section", ["MVIT.REV", "DETECTION", "MASK"])
def test_other_models_of_a_configuration_are_named(section):
    checkpoint = slowfast_checkpoint()
    place = cfg = yaml.safe_load(checkpoint["cfg"])
    for part in section.split("."):
        place = place.setdefault(part, {})
    place["ENABLE"] = True
    with pytest.raises(CheckpointError, match=rf"{section}\.ENABLE = True can't be built; only False can"):
        from_slowfast(checkpoint | {"cfg": cfg})


def test_unknown_option_is_named():
    with pytest.raises(CheckpointError, match=r"MVIT\.GATED = True can't be built; it is unknown"):
        from_slowfast(slowfast_checkpoint(MVIT__GATED=True))


@pytest.mark.parametrize("text", ["a: [", "key: value: other", "\t- x"])
def test_cfg_that_is_no_yaml(text):
    with pytest.raises(CheckpointError, match="its cfg is no plain yaml") as caught:
        from_slowfast(slowfast_checkpoint() | {"cfg": text})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cfg", ["just words", "", "- a list", {}, {"DATA": {}}, None, 3])
def test_cfg_that_is_no_mvit_configuration(cfg):
    with pytest.raises(CheckpointError, match="its cfg is no MViT configuration"):
        from_slowfast(slowfast_checkpoint() | {"cfg": cfg})
