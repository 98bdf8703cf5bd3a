"""What a training step gives a GPU to do between two that are logged, on any machine."""

from __future__ import annotations

import random
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from test_gpu import Operations

import mvit_video as mv
from mvit_video.data.augment import Augment, ClipAugmentation
from mvit_video.data.datasets import Batch
from mvit_video.data.pixels import finish_clips
from mvit_video.training.classification import Classifier
from mvit_video.training.mixing import Mixing


@pytest.mark.parametrize("mixing", [None, Mixing()], ids=["plain", "mixed"])
def test_the_host_copies_nothing_and_waits_for_nothing(mixing: Mixing | None) -> None:
    with torch.device("meta"):  # the same operations as on a GPU, without values
        model = mv.create_model("mvitv2_nano_8x4", 5, drop_path=0.2, stages=(1, 1), crop_size=32)
        module = Classifier(model, optimizer=partial(torch.optim.AdamW), lr=1e-3, mixing=mixing).to("meta")
    module._trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module.log = lambda *_, **__: None  # Lightning's own
    module._require_finite = lambda wait: None  # reads a flag that an event says is there
    optimizer = module.make_optimizer(module.parameter_groups())
    for _ in range(2):
        clips = torch.empty(4, 3, *model.config.input_size, device="meta")
        labels = torch.empty(4, dtype=torch.int64, device="meta")
        with Operations() as seen:
            loss = module.training_step(Batch(clips, labels, []), 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert seen.kernels > 100
        assert seen.host_copies == []
        assert seen.synchronisations == []


def test_clips_become_floats_on_the_device() -> None:
    """Bytes go there, and what makes clips of them neither copies from the host nor waits."""
    frames = torch.randint(0, 256, (8, 3, 40, 48), dtype=torch.uint8)
    augment = Augment(rand_augment="rand-m7-n4-mstd0.5-inc1", repeats=2)
    augmentation = ClipAugmentation(augment, 32, mean=(0.5,) * 3, std=(0.2,) * 3, rng=random.Random(0))
    clips = augmentation.to_clips(augmentation(frames))
    expected = finish_clips(clips)
    model = mv.create_model("mvitv2_nano_8x4", 5, crop_size=32)
    module = Classifier(model, optimizer=partial(torch.optim.AdamW), lr=1e-3)
    module._trainer = pl.Trainer(accelerator="cpu", precision="bf16-true", logger=False)
    batch = Batch(clips, torch.zeros(2, dtype=torch.int64), [])
    assert torch.equal(module.on_after_batch_transfer(batch, 0).clips, expected.bfloat16())
    there = move_data_to_device(batch, torch.device("meta"))
    assert [part.frames.dtype for part in there.clips] == [torch.uint8] * 2
    for _ in range(2):  # the first makes what is kept
        with Operations() as seen:
            found = module.on_after_batch_transfer(there, 0)
    assert found.clips.device.type == "meta"
    assert found.clips.shape == expected.shape
    assert seen.host_copies == seen.synchronisations == []
