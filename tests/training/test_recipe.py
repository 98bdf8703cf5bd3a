"""The learning rate and the parameter groups against the official ones."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from golden_weights import unit
from small_models import small_model
from torch.utils.data import DataLoader

import mvit_video as mv
from mvit_video.cli.train import choose_precision
from mvit_video.data.datasets import Batch
from mvit_video.errors import ConfigError, TrainingError
from mvit_video.training.callbacks import BatchPicture, EstimatedTime, duration
from mvit_video.training.classification import Classifier
from mvit_video.training.mixing import Mixing, soft_targets
from mvit_video.training.module import Losses, _Unchecked
from mvit_video.training.plots import describe_labels
from mvit_video.training.recipe import freeze, learning_rate, parameter_groups

REFERENCE = Path(__file__).parents[1] / "reference"
SCHEDULES = json.loads((REFERENCE / "protocol.json").read_text())["lr"]
MIXUP = json.loads((REFERENCE / "protocol.json").read_text())["mixup"]
GROUPS = json.loads((REFERENCE / "train_facts.json").read_text())["weight_decay_groups"][0]["groups"]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["config"])
def test_the_learning_rate_is_the_official_one(case: dict) -> None:
    for epoch, expected in case["lr"]:
        found = learning_rate(
            epoch,
            lr=case["base_lr"],
            epochs=case["epochs"],
            warmup_epochs=case["warmup"],
            warmup_start_lr=case["start"],
            end_lr=case["end"],
        )
        assert found == pytest.approx(expected, rel=1e-9)


def test_no_warmup_and_one_step_work() -> None:
    schedule = partial(learning_rate, lr=1.0, warmup_start_lr=0.1, end_lr=0.0)
    assert schedule(0, epochs=10, warmup_epochs=0) == 1.0
    assert schedule(1, epochs=1, warmup_epochs=0) == 0.0
    assert schedule(12, epochs=10, warmup_epochs=2) == 0.0


def test_weight_decay_groups_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = mv.create_model("mvitv2_s_16x4")
    groups = parameter_groups(model, 0.05)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [
        (g["tensors"], g["weight_decay"]) for g in GROUPS
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].split(".", 2)[2] for p in groups[1]["params"] if "blocks." in names[id(p)]}
    assert kinds <= set(GROUPS[1]["kinds"])


def test_frozen_parameters_are_left_out() -> None:
    model = mv.create_model("mvitv2_nano_8x4")
    model.patch_embed.requires_grad_(False)
    held = sum(len(group["params"]) for group in parameter_groups(model, 0.05))
    assert held == len(list(model.parameters())) - 2


def test_targets_are_the_official_ones() -> None:
    facts = MIXUP["target"]
    labels = torch.tensor(facts["labels"])
    found = soft_targets(labels, facts["num_classes"], lam=facts["lam"], smoothing=facts["smoothing"])
    torch.testing.assert_close(found, torch.tensor(facts["value"]), atol=1e-7, rtol=0)


def test_mixed_batches_are_the_official_ones() -> None:
    """Six batches in a row from the official code's random numbers: mixup and CutMix, pixels and targets."""
    rng = np.random.RandomState(MIXUP["numpy_seed"])
    cut = 0
    for number, batch in enumerate(MIXUP["batches"]):
        clips = torch.from_numpy(unit(f"mix{number}", 4 * 3 * 2 * 8 * 12)).reshape(4, 3, 2, 8, 12)
        before = clips.clone()
        mixed, lam = Mixing()(clips, rng)
        assert torch.equal(clips, before)
        cut += bool((mixed == before).any())
        shown = torch.tensor(batch["sample0_frame0_chan0"])
        torch.testing.assert_close(mixed[0, 0, 0], shown, atol=1e-6, rtol=0)
        torch.testing.assert_close(mixed.flatten()[: len(batch["first"])], torch.tensor(batch["first"]))
        assert mixed.mean().item() == pytest.approx(batch["out_mean"], abs=1e-6)
        assert mixed.abs().mean().item() == pytest.approx(batch["out_abs_mean"], abs=1e-6)
        targets = soft_targets(torch.tensor([0, 1, 2, 3]), 6, lam=lam, smoothing=0.1)
        torch.testing.assert_close(targets[0], torch.tensor(batch["target_row0"]), atol=1e-6, rtol=0)
    assert 0 < cut < len(MIXUP["batches"])


@pytest.mark.parametrize("settings", [{"probability": 0}, {"mixup": 0}, {"cutmix": 0}, {}])
def test_mixing_mixes_what_it_says(settings: dict) -> None:
    clips = torch.stack([torch.zeros(3, 2, 16, 16), torch.ones(3, 2, 16, 16)])
    mixing, shares = Mixing(**settings), []
    for seed in range(40):
        mixed, lam = mixing(clips, np.random.RandomState(seed))
        assert mixed[1].mean().item() == pytest.approx(lam, abs=1e-6)
        assert mixed[0].mean().item() == pytest.approx(1 - lam, abs=1e-6)
        binary = ((mixed == 0) | (mixed == 1)).all().item()
        if settings == {"probability": 0}:
            assert lam == 1
        elif "mixup" in settings:
            assert binary
        elif "cutmix" in settings:
            assert not binary
        shares.append(lam)
    assert len(set(shares)) > 20 or settings == {"probability": 0}


def test_a_batch_of_one_and_an_odd_one_work() -> None:
    rng = np.random.RandomState(0)
    assert Mixing()(torch.rand(1, 3, 1, 8, 8), rng)[1] == 1.0
    mixed, lam = Mixing(cutmix=0)(torch.rand(3, 3, 1, 8, 8), rng)
    assert mixed.shape == (3, 3, 1, 8, 8)
    assert 0 < lam < 1


def test_smoothed_targets_without_mixing_are_label_smoothing() -> None:
    logits, labels = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    soft = F.cross_entropy(logits, soft_targets(labels, 7, lam=1.0, smoothing=0.1))
    torch.testing.assert_close(soft, F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_mixing_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mixup and cutmix are both 0"):
        Mixing(mixup=0, cutmix=0)


def test_layer_decay_is_the_official_one() -> None:
    """PySlowFast: decay ** (depth + 1 - layer), where the embedding is layer 0 and block i layer i + 1."""
    with torch.device("meta"):
        model = mv.create_model("mvitv2_s_16x4")
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in parameter_groups(model, 0.05, 0.75):
        for parameter in group["params"]:
            name = names[id(parameter)]
            parts = name.split(".")
            depth = len(model.blocks)
            if parts[0] in ("cls_token", "patch_embed"):
                layer = 0
            else:
                layer = int(parts[1]) + 1 if parts[0] == "blocks" else depth + 1
            assert group["lr_scale"] == pytest.approx(0.75 ** (depth + 1 - layer))
            assert group["weight_decay"] == (0 if parameter.ndim == 1 else 0.05)
            seen.add(name)
    assert seen == set(names.values())


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(ConfigError, match="layer_decay needs an MViT"):
        parameter_groups(torch.nn.Linear(2, 2), 0.05, 0.5)


def test_freezing_the_backbone_leaves_the_head() -> None:
    model = mv.create_model("mvitv2_nano_8x4", drop_path=0.9)
    freeze(model, ["backbone"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.projection.weight",
        "head.projection.bias",
    ]
    clips = torch.randn(1, 3, 8, 64, 64)
    features = [model.forward_features(clips) for _ in range(4)]
    assert all(torch.equal(features[0], other) for other in features)  # no drop path
    assert model.head.training


def test_parts_are_frozen_by_name() -> None:
    model = mv.create_model("mvitv2_nano_8x4")
    freeze(model, ["blocks.1", "cls_token"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "cls_token" in frozen
    assert {name.rsplit(".", 1)[0][:8] for name in frozen - {"cls_token"}} == {"blocks.1"}
    assert not model.blocks[1].attn.training
    assert model.blocks[0].attn.training
    with pytest.raises(ConfigError, match=r"no 'blocks.9'; it has: backbone, patch_embed"):
        freeze(model, ["blocks.9"])
    with pytest.raises(ConfigError, match="nothing is left"):
        freeze(model, ["patch_embed", "cls_token", "blocks", "norm", "head"])


def trainer_on_cpu(folder: Path, **options) -> pl.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"max_epochs": 1, **dict.fromkeys(quiet, False), **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **options)


def fit(folder: Path, *, batches: int = 4, trainer: dict | None = None, **settings) -> Classifier:
    """Train a tiny model on noise, four videos at once."""
    classifier = Classifier(
        small_model(num_frames=2), **{"optimizer": torch.optim.SGD, **settings}, batch_size=4
    )
    batch = Batch(torch.randn(4, 3, 2, 16, 16), torch.arange(4) % 3, [])
    trainer_on_cpu(folder, **trainer or {}).fit(classifier, DataLoader([batch] * batches, batch_size=None))
    return classifier


@pytest.mark.parametrize(("lr_batch_size", "accumulate", "scale"), [(None, 1, 1), (8, 1, 0.5), (2, 2, 4)])
def test_rates_are_scaled_with_the_videos_of_a_step(
    tmp_path: Path, lr_batch_size: int | None, accumulate: int, scale: float
) -> None:
    rates: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[-1]["lr"])
            return super().step(closure)

    settings = {"lr": 0.1, "warmup": 0.25, "warmup_start_lr": 0.02, "end_lr": 0.01}
    settings |= {"optimizer": Noting, "lr_batch_size": lr_batch_size, "layer_decay": 0.5}
    trainer = {"accumulate_grad_batches": accumulate}
    classifier = fit(tmp_path, batches=8 * accumulate, trainer=trainer, **settings)
    plan = partial(learning_rate, lr=0.1, epochs=8, warmup_epochs=2, warmup_start_lr=0.02, end_lr=0.01)
    assert rates == pytest.approx([scale * plan(step) for step in range(8)])
    first, last = classifier.optimizers(False).param_groups[0], classifier.optimizers(False).param_groups[-1]
    assert first["lr"] == pytest.approx(last["lr"] * 0.5 ** (len(classifier.model.blocks) + 1))


def test_mixing_follows_from_seed_epoch_and_batch(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Watching(Mixing):
        def __call__(self, clips, rng):
            mixed, lam = super().__call__(clips, rng)
            seen.append(mixed)
            return mixed, lam

    for seed in (1, 1, 2):
        fit(tmp_path, lr=0.0, mixing=Watching(), seed=seed, trainer={"max_epochs": 2})
        np.random.default_rng().random()
    first, again, other = seen[:8], seen[8:16], seen[16:]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(clips.flatten().tolist()) for clips in first}) == 8  # each batch and epoch its own


def test_what_the_model_sees_is_drawn_and_the_time_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "mvit_video"):
        callbacks = [EstimatedTime(), BatchPicture(tmp_path / "batch.png")]
        fit(tmp_path, lr=0.1, trainer={"max_epochs": 3, "callbacks": callbacks})
    assert (tmp_path / "batch.png").stat().st_size > 5000
    told = [message for message in caplog.messages if "one epoch will take about" in message]
    assert len(told) == 1
    assert "(validation not counted)" in told[0]


@pytest.mark.parametrize("in_flight", [0, 2])
def test_a_broken_loss_that_is_seen_later_leaves_its_own_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    """On a GPU a loss is looked at when it is there, some steps later; nothing waits for it."""
    monkeypatch.setattr(_Unchecked, "is_there", lambda self: classifier.global_step >= self.step + in_flight)
    classifier = Classifier(small_model(num_frames=2), optimizer=torch.optim.SGD, lr=0.0)
    values = (0.0, torch.nan, 2.0, 3.0, 4.0, 5.0)
    batches = [Batch(torch.full((2, 3, 2, 16, 16), value), torch.tensor([0, 1]), []) for value in values]
    trainer = trainer_on_cpu(tmp_path)
    with pytest.raises(TrainingError, match="step 1;"):
        trainer.fit(classifier, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 1 + in_flight
    assert torch.load(tmp_path / "nan_batch_rank0.pt", weights_only=True)["clips"].isnan().all()


def test_no_checkpoint_is_written_of_a_broken_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Unchecked, "is_there", lambda self: False)
    classifier = fit(tmp_path, lr=0.0)
    classifier._unchecked.append(_Unchecked(Losses({"loss": torch.tensor(float("inf"))}, 1, {}), step=3))
    with pytest.raises(TrainingError, match="step 3;"):
        classifier.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("asked", "accelerator", "has_bf16", "found"),
    [
        ("auto", "auto", True, "bf16-mixed"),
        ("auto", "auto", False, "32-true"),
        ("auto", "cpu", True, "32-true"),
        ("16-mixed", "gpu", True, "16-mixed"),
    ],
)
def test_precision_follows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, asked: str, accelerator: str, has_bf16: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision(asked, accelerator) == found


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "1 s"), (59.4, "59 s"), (80, "80 s"), (100, "2 min"), (600, "10 min"), (3600, "1 h 0 min"),
        (86000, "23 h 53 min"), (86399, "1 d 0 h"), (200000, "2 d 8 h"),
    ],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_labels_are_counted() -> None:
    few = describe_labels([0, 0, 0, 1], ["cats", "dogs", "birds"]).splitlines()
    assert [line.split()[:2] for line in few] == [["birds", "0"], ["dogs", "1"], ["cats", "3"]]
    many = describe_labels([*range(30), 7, 7], [f"class {i}" for i in range(30)]).splitlines()
    assert many[0] == "30 classes of 1 to 3 videos, median 1"
    assert many[-1].startswith("class 7")
    assert len(many) == 11
