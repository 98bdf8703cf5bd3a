"""Accuracy beside torchvision's model: python benchmarks/learning.py [--seeds 3] [--root DIR] [--write]

The demo's nano model and torchvision's MViT of the same layout, each with its own initialisation, are trained
by the demo's recipe on the motion data set, with the same seeds and batches, and measured on its validation
videos (centre clip) after every epoch. With --write the table and the curves go to benchmarks/.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import hydra
import matplotlib
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from mvit_video.cli import CONF_DIR
from mvit_video.data.clips import TestViews, TrainingClips, training_loader, validation_loader
from mvit_video.data.index import VideoSplits
from mvit_video.model import MViT
from mvit_video.recipe import History

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "model"))  # others' models with our layout
from peers import torchvision_layout  # type: ignore[import-not-found]  # noqa: E402

HEADING = "## Learning"


class TorchvisionTwin(nn.Module):
    """torchvision's MViT with the layout of one of our models, freshly initialised as torchvision does."""

    def __init__(self, ours: MViT) -> None:
        super().__init__()
        self.config, self.protocol, self.class_names = ours.config, ours.protocol, ours.class_names
        self.net = torchvision_layout(ours.config)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, 3, T, H, W)."""
        return self.net(clips)


def train(config: DictConfig, *, twin: bool, seed: int) -> list[dict[str, float]]:
    """The metrics of every epoch."""
    pl.seed_everything(seed, workers=True, verbose=False)
    splits: VideoSplits = instantiate(config.data, _convert_="all")
    ours = instantiate(config.model, num_classes=splits.num_classes, _convert_="all")
    classifier = instantiate(config.optim, model=TorchvisionTwin(ours) if twin else ours, _convert_="all")
    augment = instantiate(config.augment, _convert_="all")
    loading = {"batch_size": config.batch_size, "num_workers": config.num_workers, "pin_memory": False}
    history = History()
    with tempfile.TemporaryDirectory() as folder:
        trainer = instantiate(
            config.trainer, callbacks=[history], logger=False, default_root_dir=folder, _convert_="all"
        )
        trainer.fit(
            classifier,
            training_loader(TrainingClips(splits.train.videos, ours.protocol, augment, seed=seed), **loading),
            validation_loader(TestViews(splits.val.videos, ours.protocol), **loading),
        )
    return history.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", default="demo/motion", help="made by make demo")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="update benchmarks/README.md and learning.png")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                "experiment=motion",
                f"data.root={arguments.root}",
                f"trainer.max_epochs={arguments.epochs}",
                "trainer.enable_progress_bar=false",
                "trainer.enable_checkpointing=false",
            ],
        )
    curves: dict[str, list[list[float]]] = {"mvit_video": [], "torchvision": []}
    for seed in range(arguments.seeds):
        for name, found in curves.items():
            epochs = train(config, twin=name == "torchvision", seed=seed)
            found.append([100 * epoch["val/top1"] for epoch in epochs])
            print(f"seed {seed}, {name}: {found[-1][-1]:.1f} %", flush=True)
    section = report(curves)
    print(section)
    if arguments.write:
        plot(curves)
        path = HERE / "README.md"
        before, _, rest = path.read_text().partition(HEADING)
        _, mark, after = rest.partition("\n## ")
        path.write_text(f"{before.rstrip()}\n\n{section}{mark}{after}")


def report(curves: dict[str, list[list[float]]]) -> str:
    seeds = range(len(curves["mvit_video"]))
    lines = [
        HEADING,
        "",
        "`python benchmarks/learning.py --write`: the nano model of the demo and torchvision's MViT of the",
        "same layout, same recipe, same batches: top-1 in percent on the motion validation videos",
        f"(centre clip) after the last epoch; torch {torch.__version__}.",
        "",
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        f"|---|{'---|' * (len(seeds) + 1)}",
    ]
    for name, runs in curves.items():
        last = [run[-1] for run in runs]
        lines.append(f"| {name} | {' | '.join(f'{v:.1f}' for v in last)} | {statistics.mean(last):.1f} |")
    return "\n".join([*lines, "", "![accuracy by epoch](learning.png)"]) + "\n"


def plot(curves: dict[str, list[list[float]]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for colour, (name, runs) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        for seed, run in enumerate(runs):
            label = name if seed == 0 else None
            axes.plot(range(1, len(run) + 1), run, color=colour, alpha=0.8, label=label)
    axes.set(xlabel="epoch", ylabel="top-1 on validation videos (%)", ylim=(0, 101))
    axes.legend()
    figure.savefig(HERE / "learning.png", dpi=120)


if __name__ == "__main__":
    main()
