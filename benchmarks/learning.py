"""What training reaches. With --write the tables and the curves go to benchmarks/.

python benchmarks/learning.py [--seeds 3] [--root DIR] [--write]

    The demo's nano model and torchvision's MViT of the same layout, each with its own initialisation, are
    trained by the demo's recipe on the motion data set, with the same seeds and batches, and measured on its
    validation videos (centre clip) after every epoch.

python benchmarks/learning.py --clips VIDEO ... [--weights FILE] [--write]

    Real videos are told apart: segments of their first 60 % train, segments of their last 30 % test, and the
    class is the video. The weights, those of the demo, are fine-tuned, and probed, by the project's commands.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import hydra
import matplotlib
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from mvit_video.cli.conf import CONF_DIR
from mvit_video.data.datasets import ClipDataset, ViewDataset, training_loader, validation_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import VideoSplits
from mvit_video.model import MViT
from mvit_video.training.metrics import EpochLogger, ResumableMetrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "model"))  # others' models with our layout
from peers import torchvision_layout  # type: ignore[import-not-found]  # noqa: E402

HEADING, CLIPS_HEADING = "## Learning", "## Fine-tuning on real clips"
DEMO_WEIGHTS = Path("demo/train/checkpoints/best.ckpt")

SEGMENT = 32  # frames
SEGMENTS = 12  # of a video for training, and for the test, where it is long enough
PARTS = {"train": (0.0, 0.6), "val": (0.7, 1.0)}  # of a video
SHORT_SIDE = 256


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
    history = EpochLogger()
    with tempfile.TemporaryDirectory() as folder:
        trainer = instantiate(
            config.trainer,
            callbacks=[ResumableMetrics(), history],
            logger=False,
            default_root_dir=folder,
            _convert_="all",
        )
        trainer.fit(
            classifier,
            training_loader(ClipDataset(splits.train.videos, ours.protocol, augment, seed=seed), **loading),
            validation_loader(ViewDataset(splits.val.videos, ours.protocol), **loading),
        )
    return history.epochs


def cut(video: Path, root: Path, tiles: int = 1) -> dict[str, int]:
    """Write overlapping segments of a video as h264 below ``root/train`` and ``root/val``: how many.

    Of several tiles along each side of the picture, each has a folder of its own.
    """
    with open_video(video) as source:
        frames = source.get_frames(list(range(source.num_frames)))  # uint8 (T, 3, H, W)
        rate = round(source.fps)
    counts = {}
    for row, part in enumerate(frames.chunk(tiles, dim=2)):
        for column, tile in enumerate(part.chunk(tiles, dim=3)):
            name = video.stem if tiles == 1 else f"{video.stem}_{row}{column}"
            counts = _write_segments(tile, rate, root, name)
    return counts


def _write_segments(frames: Tensor, rate: int, root: Path, name: str) -> dict[str, int]:
    """As ``cut``, of frames uint8 (T, 3, H, W) and below folders of this name."""
    scale = min(SHORT_SIDE / min(frames.shape[2:]), 1)
    height, width = (round(side * scale / 2) * 2 for side in frames.shape[2:])
    counts = {}
    for part, (start, end) in PARTS.items():
        first, last = int(start * len(frames)), int(end * len(frames))
        length = min(SEGMENT, last - first)
        hop = max(2, (last - first - length) // SEGMENTS)
        starts = range(first, last - length + 1, hop)
        folder = root / part / name
        folder.mkdir(parents=True)
        for number, begin in enumerate(starts):
            with av.open(str(folder / f"{number:03d}.mp4"), "w") as target:
                stream = target.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                for frame in frames[begin : begin + length].permute(0, 2, 3, 1):
                    picture = av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")
                    target.mux(stream.encode(picture.reformat(width, height)))
                target.mux(stream.encode(None))
        counts[part] = len(starts)
    return counts


def command(name: str, *arguments: str) -> None:
    """Run ``mvit-NAME``; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", f"mvit_video.{name}", *arguments], check=True)


def learn_clips(videos: list[Path], weights: Path) -> str:
    """Fine-tune and probe on segments of videos: the section for the README."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        counts = {video.stem: cut(video, root / "data") for video in videos}
        data = ["data=folder", f"data.root={root / 'data'}"]
        for experiment, lr in (("finetune", "1e-3"), ("linear_probe", "1e-2")):  # few videos, so few steps
            folder = root / experiment
            command(
                "train",
                f"experiment={experiment}",
                f"optim.lr={lr}",
                "model=mvitv2_nano_8x4",
                f"weights={weights.absolute()}",
                *data,
                "trainer.enable_progress_bar=false",
                f"hydra.run.dir={folder}",
            )
            last = folder / "checkpoints" / "last.ckpt"  # the best would be chosen by what is measured
            command("eval", *data, f"weights={last}", "views=1x1", f"hydra.run.dir={folder / 'eval'}")
            results = json.loads((folder / "eval" / "results.json").read_text())
            rows.append(f"| `experiment={experiment} optim.lr={lr}` | {results['clip_top1']:.3f} |")
    sources = [f"{name} {count['train']} + {count['val']}" for name, count in counts.items()]
    tests = [count["val"] for count in counts.values()]
    largest = max(tests) / sum(tests)
    lines = [
        CLIPS_HEADING,
        "",
        "`python benchmarks/learning.py --clips VIDEO ... --write`: the nano model with the demo's weights,",
        "by the project's own commands, after their last epoch (few videos make few steps, so the rates",
        "are large). A class is a video: segments of 32 frames from its first 60 % train, from its last 30 %",
        "test. Training + test:",
        f"{', '.join(sources)}; the largest class is {largest:.3f} of the test. A probe has what the demo's",
        "weights know: motions of generated shapes.",
        "",
        "| 20 epochs | clip top-1 |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def write(heading: str, section: str) -> None:
    """Put a section into the README, in the place of the one with its heading."""
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(heading)
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{section}{mark}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=Path, nargs="+", metavar="VIDEO")
    parser.add_argument(
        "--weights", type=Path, default="demo/train/checkpoints/best.ckpt", help="for --clips"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", default="demo/motion", help="made by make demo")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="update benchmarks/README.md and learning.png")
    arguments = parser.parse_args()
    if arguments.clips:
        section = learn_clips(arguments.clips, arguments.weights)
        print(section)
        if arguments.write:
            write(CLIPS_HEADING, section)
        return
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
        write(HEADING, section)


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
