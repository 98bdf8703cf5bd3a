"""Adapters of peft: they train, load and merge; nothing computes past them."""

from pathlib import Path

import pytest
import torch

import mvit_video as mv

peft = pytest.importorskip("peft", reason="peft isn't installed: pip install 'mvit-video[lora]'")


def base() -> mv.MViT:
    torch.manual_seed(0)
    return mv.create_model(
        "mvitv2_nano_8x4", 4, embed_dim=16, stages=(1, 1), crop_size=32, num_frames=4
    ).eval()


@pytest.mark.parametrize("targets", [["qkv", "attn.proj"], ["mlp.fc1", "mlp.fc2"]])
def test_adapters_train_load_and_merge(tmp_path: Path, targets: list[str]) -> None:
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = base()(clips)
    settings = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=["head.projection"], init_lora_weights=False
    )
    model = peft.get_peft_model(base(), settings).eval()
    adapted = model(clips)
    assert (adapted - plain).abs().max() > 1e-3
    adapted.square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(clips), adapted)
    torch.testing.assert_close(again.merge_and_unload()(clips), adapted)
