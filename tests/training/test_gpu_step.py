"""What a training step gives a GPU to do between two that are logged, on any machine."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from test_gpu import Operations

import mvit_video as mv
from mvit_video.data.datasets import Batch
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
