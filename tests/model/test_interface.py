"""What timm's users expect of a model."""

import pytest
import torch
from timm.optim import param_groups_weight_decay

import mvit_video as mv

SMALL = {"embed_dim": 16, "stages": (1, 2, 1), "crop_size": 32, "num_frames": 4}
CLIPS = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))


def small(**options: object) -> mv.MViT:
    torch.manual_seed(0)
    return mv.create_model("mvitv2_nano_8x4", 5, **SMALL, **options).eval()


def test_intermediates_are_the_maps_of_the_stages() -> None:
    model = small()
    pooled, maps = model.forward_intermediates(CLIPS)
    torch.testing.assert_close(model.head(pooled), model(CLIPS))
    assert pooled.shape == (2, model.num_features)
    for found, expected in zip(maps, model.forward_stages(CLIPS), strict=True):
        torch.testing.assert_close(found, expected)
    (last,) = model.forward_intermediates(CLIPS, 1, intermediates_only=True)
    torch.testing.assert_close(last, maps[-1])
    chosen = model.forward_intermediates(CLIPS, [0, 2], intermediates_only=True)
    assert [m.shape for m in chosen] == [maps[0].shape, maps[2].shape]


@pytest.mark.parametrize("out_indices", [None, (1, 2)])
def test_features_only_gives_what_its_info_says(out_indices: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    model = mv.create_model("mvitv2_nano_8x4", features_only=True, out_indices=out_indices, **SMALL).eval()
    maps = model(CLIPS)
    assert len(maps) == len(model.feature_info) == (3 if out_indices is None else 2)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert [n // s for n, s in zip(CLIPS.shape[2:], info["reduction"], strict=True)] == list(
            found.shape[2:]
        )
    assert not any(name.startswith("model.head") for name, _ in model.named_parameters())


def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(IndexError):
        mv.create_model("mvitv2_nano_8x4", features_only=True, out_indices=(7,), **SMALL)
    with pytest.raises(IndexError):
        small().forward_intermediates(CLIPS, [7])


def test_the_head_is_exchanged() -> None:
    model = small()
    model.class_names = ("a", "b", "c", "d", "e")
    features = model.forward_features(CLIPS)
    model.reset_classifier(7)
    assert model.get_classifier().out_features == model.num_classes == model.config.num_classes == 7
    assert model(CLIPS).shape == (2, 7)
    assert model.class_names is None
    torch.testing.assert_close(model.forward_features(CLIPS), features)


def test_checkpointing_gives_the_same_gradients() -> None:
    model = small()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(CLIPS).sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_an_optimizer_of_timm_leaves_positions_without_decay() -> None:
    model = small(class_token=True)
    names = model.no_weight_decay()
    assert "cls_token" in names
    assert any("rel_pos_h" in name for name in names)
    plain, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=names)
    assert plain["weight_decay"] == 0
    assert any(parameter is model.cls_token for parameter in plain["params"])
    assert any(parameter is model.get_classifier().weight for parameter in decayed["params"])
