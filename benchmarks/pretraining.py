"""What learning without labels brings, and what it costs. With --write, table and picture go to benchmarks/.

python benchmarks/pretraining.py [--seeds 3] [--root DIR] [--clips VIDEO ...] [--write]

    The nano model is pre-trained on all training videos of the motion data set, whose labels it doesn't see.
    Then it is trained on 1, 5 and 20 labelled videos a class, from these weights, from those of its first
    block alone, and from scratch, with the same videos, steps and rates, and measured on all validation
    videos (centre clip). --clips does the same with real videos: a class is a quarter of a video's picture,
    segments of its first 60 % train, segments of its last 30 % test.

python benchmarks/pretraining.py --speed

    One forward and backward pass of MViTv2-S, masked (MaskFeat) and as a classifier, and the share of HOG.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from learning import cut, write

import mvit_video as mv
from mvit_video.data.augment import Augment
from mvit_video.data.datasets import Batch, ClipDataset, ViewDataset, training_loader, validation_loader
from mvit_video.data.index import LabelledVideo, VideoSplits, folder_splits
from mvit_video.pretraining.data import MaskedTestViews, MaskedTrainingClips, collate_masked
from mvit_video.pretraining.hog import hog_targets
from mvit_video.pretraining.masks import Masking
from mvit_video.pretraining.pretrainer import Pretrainer
from mvit_video.training.classification import Classifier
from mvit_video.training.module import TrainingModule

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
HEADING, SPEED_HEADING = "## Learning without labels", "## Speed of a pre-training"
AUGMENT = Augment(area=(0.5, 1.0), flip_probability=0.0)  # classes differ by direction
MASKING = Masking("frame", cell=8)  # learnt within fewer steps than cuboids
LAYOUT: dict[str, Any] = {"crop_size": 32, "kv_stride": (1, 2, 2)}  # of the nano model: small and quick
BATCH = 8
PER_CLASS = (1, 5, 20)
MOTION, REAL = "Motion", "Real clips"
STEPS = {MOTION: (3000, 300), REAL: (1500, 100)}  # of pre- and fine-tuning
ARMS = {  # what of the pre-training's weights stays fresh; None: all
    "from scratch": None,
    "all blocks pre-trained": (),
    "the first block pre-trained": ("blocks.1", "blocks.2"),
}
RECIPE: dict[str, Any] = {
    "optimizer": torch.optim.AdamW,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "batch_size": BATCH,
}


def fit(module: TrainingModule, loader: Any, *, steps: int, clip: float) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=clip,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader)


def pretrain(splits: VideoSplits, *, steps: int, lr: float, seed: int) -> tuple[mv.MViT, list[float]]:
    """The model; on held-out videos its loss, that of one answer for all, and that of neighbours in time."""
    pl.seed_everything(seed, verbose=False)
    model = mv.create_pretrainer("maskfeat_mvitv2_nano_8x4", **LAYOUT)
    spec = model.protocol
    draw = partial(
        MASKING.draw, window=MASKING.window(spec.clip_frames, spec.crop, model.config.patch_stride[0])
    )
    clips = MaskedTrainingClips(splits.train.videos, spec, AUGMENT, seed=seed, draw_mask=draw)
    one_view = replace(spec, num_clips=1, num_crops=1)
    views = MaskedTestViews(splits.val.videos, one_view, seed=seed, draw_mask=draw)
    training = training_loader(clips, collate_masked, batch_size=BATCH, num_workers=0)
    held_out = validation_loader(views, collate_masked, batch_size=BATCH, num_workers=0)
    fit(Pretrainer(model, lr=lr, seed=seed, **RECIPE), training, steps=steps, clip=0.02)
    model.eval()
    with torch.no_grad():
        loss = statistics.mean(model.loss(batch.clips, batch.masks).item() for batch in held_out)
        side = spec.crop // 8
        true = torch.cat(
            [hog_targets(batch.clips, (4, side, side)).unflatten(1, (4, -1)) for batch in held_out]
        )
    constant = true.sub(true.mean((0, 1, 2))).square().mean()
    copied = true[:, 1:-1].sub((true[:, :-2] + true[:, 2:]) / 2).square().mean()
    return model, [loss, constant.item(), copied.item()]


def learn(
    labelled: list[LabelledVideo],
    test: list[Batch],
    start: tuple[Any, Sequence[str] | None],
    *,
    classes: int,
    steps: int,
    lr: float,
    seed: int,
) -> float:
    """Top-1 in percent on batches of validation videos."""
    pl.seed_everything(seed, verbose=False)
    model = mv.create_model("mvitv2_nano_8x4", num_classes=classes, mean_pooling=True, **LAYOUT)
    weights, fresh = start
    if fresh is not None:
        mv.load_weights(model, weights, head="new", fresh=fresh)
    clips = ClipDataset(labelled, model.protocol, AUGMENT, seed=seed)
    loader = training_loader(clips, batch_size=min(BATCH, len(labelled)), num_workers=0)
    fit(Classifier(model, lr=lr, seed=seed, label_smoothing=0.0, **RECIPE), loader, steps=steps, clip=1.0)
    model.eval()
    with torch.no_grad():
        hits = [(model(batch.clips).argmax(1) == batch.labels).float() for batch in test]
    return 100 * torch.cat(hits).mean().item()


def choose(splits: VideoSplits, per_class: int, seed: int) -> list[LabelledVideo]:
    """So many videos of each class, at random; fewer are among more."""
    rng = random.Random(seed)
    chosen = []
    for label in range(splits.num_classes):
        videos = [video for video in splits.train.videos if video.label == label]
        chosen += rng.sample(videos, len(videos))[:per_class]
    return chosen


def compare(
    root: str | Path, seeds: int, steps: tuple[int, int], rates: tuple[float, float]
) -> dict[str, Any]:
    """The losses of each seed's pre-training, and top-1 in percent of each arm and number of videos."""
    splits = folder_splits(root)
    spec = mv.create_model("mvitv2_nano_8x4", **LAYOUT).protocol
    views = ViewDataset(splits.val.videos, replace(spec, num_clips=1, num_crops=1))
    test = list(validation_loader(views, batch_size=16, num_workers=0))
    found: dict[str, Any] = {
        "loss": [],
        "steps": steps,
        "train": len(splits.train),
        "val": len(splits.val),
        "largest": 100
        * max(torch.bincount(torch.cat([batch.labels for batch in test])).tolist())
        / len(splits.val),
        "top1": {arm: {number: [] for number in PER_CLASS} for arm in ARMS},
    }
    for seed in range(seeds):
        start = time.perf_counter()
        model, losses = pretrain(splits, steps=steps[0], lr=rates[0], seed=seed)
        found["loss"].append(losses)
        print(f"seed {seed}: {losses} after {time.perf_counter() - start:.0f} s", flush=True)
        for number in PER_CLASS:
            labelled = choose(splits, number, seed)
            for arm, fresh in ARMS.items():
                top1 = learn(
                    labelled,
                    test,
                    (model.state_dict(), fresh),
                    classes=splits.num_classes,
                    steps=steps[1],
                    lr=rates[1],
                    seed=seed,
                )
                found["top1"][arm][number].append(top1)
                print(f"  {number} a class, {arm}: {top1:.1f} %", flush=True)
    return found


def report(results: dict[str, dict[str, Any]], rates: tuple[float, float]) -> str:
    about = (
        "`python benchmarks/pretraining.py --clips VIDEO ... --write`: the nano model at "
        f"{LAYOUT['crop_size']} pixels is pre-trained on training videos without their labels (batches of "
        f"{BATCH} clips, rate {rates[0]:g}, whole frames masked), then trained on few labelled ones (rate "
        f"{rates[1]:g}), against the same training from scratch: top-1 in percent on the validation videos "
        "(centre clip), the mean of the seeds and each of them. Seeds have other labelled videos; torch "
        f"{torch.__version__}."
    )
    lines = [HEADING, "", textwrap.fill(about, 110), ""]
    for name, found in results.items():
        loss, constant, copied = (statistics.mean(values) for values in zip(*found["loss"], strict=True))
        data = (
            f"**{name}**: {found['steps'][0]} steps of pre-training on {found['train']} videos, then "
            f"{found['steps'][1]} steps; {found['val']} validation videos, of which the largest class is "
            f"{found['largest']:.1f} %. Loss on held-out videos after pre-training {loss:.4f}; one answer "
            f"for all places costs {constant:.4f}, the mean of the true features of the frames before and "
            f"behind {copied:.4f}."
        )
        rows = []
        for number in PER_CLASS:
            runs = [found["top1"][arm][number] for arm in ARMS]
            texts = [f"{statistics.mean(run):.1f} ({', '.join(f'{v:.1f}' for v in run)})" for run in runs]
            rows.append(f"| {number} | {' | '.join(texts)} |")
        head = f"| labelled videos a class | {' | '.join(ARMS)} |\n|{'---|' * (1 + len(ARMS))}"
        lines += [textwrap.fill(data, 110), "", head, *rows, ""]
    return "\n".join([*lines, "![top-1 by labelled videos](pretraining.png)"]) + "\n"


def plot(results: dict[str, dict[str, Any]]) -> None:
    figure, plots = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained", squeeze=False
    )
    for axes, (name, found) in zip(plots[0], results.items(), strict=True):
        for arm, colour in zip(ARMS, ("tab:orange", "tab:grey", "tab:blue"), strict=True):
            runs = [found["top1"][arm][number] for number in PER_CLASS]
            axes.plot(PER_CLASS, [statistics.mean(run) for run in runs], color=colour, label=arm)
            for number, run in zip(PER_CLASS, runs, strict=True):
                axes.scatter([number] * len(run), run, color=colour, s=12, alpha=0.7)
        axes.axhline(found["largest"], color="black", linestyle=":", label="largest class")
        axes.set(
            title=name, xlabel="labelled videos a class", ylabel="top-1 (%)", xscale="log", ylim=(0, 101)
        )
        axes.set_xticks(PER_CLASS, [str(number) for number in PER_CLASS])
    plots[0][-1].legend(loc="lower right")
    figure.savefig(HERE / "pretraining.png", dpi=110)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(rounds: int) -> str:
    """A pass of each model in turns, least times: the section for the README."""
    classifier = mv.create_model("mvitv2_s_16x4", drop_path=0.0, head_dropout=0.0)
    masked = mv.create_pretrainer("maskfeat_mvitv2_s_16x4")
    clips, labels = torch.randn(1, 3, 16, 224, 224), torch.zeros(1, dtype=torch.long)
    masks = Masking().draw(random.Random(0), (8, 7, 7)).unsqueeze(0)
    runs: dict[str, Callable[[], Any]] = {
        "classifier": lambda: F.cross_entropy(classifier(clips), labels).backward(),
        "masked": lambda: masked.loss(clips, masks).backward(),
        "HOG": lambda: hog_targets(clips, (8, 14, 14)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    plain, whole, features = (min(found) for found in times.values())
    about = (
        "`python benchmarks/pretraining.py --speed --write`: forward and backward pass of one "
        f"clip, MViTv2-S 16x4, float32, {torch.get_num_threads()} thread(s), least of {rounds}, on a machine "
        f"that had other work to do; torch {torch.__version__}."
    )
    table = (
        "| classifier (64.5 GMACs) | MaskFeat (86.7) | ratio | HOG | share of a masked pass |\n"
        "|---|---|---|---|---|\n"
        f"| {plain:.2f} s | {whole:.2f} s | {whole / plain:.2f} | {1000 * features:.0f} ms | "
        f"{100 * features / whole:.1f} % |"
    )
    return "\n".join([SPEED_HEADING, "", textwrap.fill(about, 110), "", table]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", default="demo/motion", help="made by make demo")
    parser.add_argument("--clips", type=Path, nargs="+", default=[], metavar="VIDEO", help="real ones")
    parser.add_argument("--steps", type=int, nargs=2, help="of pre- and fine-tuning")
    parser.add_argument("--rates", type=float, nargs=2, default=(3e-3, 2e-3), help="learning rates of both")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="for --speed")
    parser.add_argument(
        "--write", action="store_true", help="update benchmarks/README.md and pretraining.png"
    )
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    if arguments.speed:
        heading, section = SPEED_HEADING, speed(arguments.rounds)
    else:
        steps = {name: arguments.steps or default for name, default in STEPS.items()}
        seeds, rates = arguments.seeds, arguments.rates
        results = {MOTION: compare(arguments.root, seeds, steps[MOTION], rates)}
        if arguments.clips:
            with tempfile.TemporaryDirectory() as folder:
                for video in arguments.clips:
                    cut(video, Path(folder), tiles=2)
                results[REAL] = compare(folder, seeds, steps[REAL], rates)
        heading, section = HEADING, report(results, rates)
        if arguments.write:
            plot(results)
    print(section)
    if arguments.write:
        write(heading, section)


if __name__ == "__main__":
    main()
