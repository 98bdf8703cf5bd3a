"""Whether action detection learns who does what. With --write the table and a picture go to benchmarks/.

python benchmarks/action_detection.py [--root DIR] [--epochs 4] [--write]

    The nano model is trained by experiment=motion_actions on films of three things, each with its own motion,
    and asked about the true boxes of the validation films. Then it is asked about the box of another thing in
    the same film each time: a model that looked elsewhere than into the box would be as good.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "datasets" / "motion"))
from generate_actions import KEY_SECOND, generate_actions  # noqa: E402
from learning import write  # noqa: E402

from mvit_video.action_detection.annotations import ActionSplits, KeyFrame, action_splits  # noqa: E402
from mvit_video.action_detection.checkpoint import load_action_detector  # noqa: E402
from mvit_video.action_detection.drawing import draw_people  # noqa: E402
from mvit_video.action_detection.evaluation import Scored, detections_of, score_people  # noqa: E402
from mvit_video.action_detection.metrics import mean_average_precision  # noqa: E402
from mvit_video.data.decode import open_video  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HEADING = "## Learning of an action detector"
DEALS = 20  # of the scores among the boxes: what chance gives
SHOWN = 6  # films in the picture

Measured = tuple[float, dict[int, float | None]]  # frame-level mAP at IoU 0.5, and that of each class


def shifted(frame: KeyFrame) -> KeyFrame:
    """The key frame with each thing's box moved on to the next thing."""
    return frame._replace(boxes=frame.boxes[1:] + frame.boxes[:1])


def measure(weights: Path, splits: ActionSplits) -> tuple[dict[str, Measured], list[Scored]]:
    """What is reached by what was asked; and what was said of each thing."""
    detector = load_action_detector(weights)
    own = splits.val.key_frames
    running: dict[str, Any] = {"batch_size": 8, "device": "cpu", "autocast": nullcontext()}
    running |= {"open_file": open_video, "num_workers": 0}

    def said(frames: tuple[KeyFrame, ...]) -> list[Scored]:
        """What was seen in the boxes of ``frames``, said of the own ones."""
        found = score_people(detector, frames, **running)
        return [Scored(frame, scores) for frame, (_, scores) in zip(own, found, strict=True)]

    def precision(scored: list[Scored]) -> Measured:
        rows = detections_of(scored, splits.names)
        return mean_average_precision(splits.val.ground_truth, rows, class_ids=splits.names, order="file")

    true, others = said(own), said(tuple(map(shifted, own)))
    counts, scores = [len(frame.boxes) for frame in own], torch.cat([scores for _, scores in true])
    generator, dealt = torch.Generator().manual_seed(0), []
    for _ in range(DEALS):
        mixed = scores[torch.randperm(len(scores), generator=generator)].split(counts)
        dealt.append(precision([Scored(*pair) for pair in zip(own, mixed, strict=True)])[0])
    found = {"the true boxes": precision(true), "the boxes of another thing": precision(others)}
    return found | {"scores dealt out at random": (float(np.mean(dealt)), {})}, true


def plot(found: dict[str, Measured], true: list[Scored], names: dict[int, str]) -> None:
    """What is said of things in a few films, and the precision of each class."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(1.3, 1)))
    for axes, (frame, scores) in zip(left.subplots(2, 3).flat, true[:SHOWN], strict=True):
        with open_video(frame.path) as video:
            (picture,) = video.get_frames([int(np.searchsorted(video.times, KEY_SECOND - 1e-6))])
        height, width = picture.shape[1:]
        large = torch.nn.functional.interpolate(picture[None].float(), scale_factor=4)[0].to(torch.uint8)
        boxes = torch.tensor(frame.boxes) * torch.tensor([width, height] * 2) * 4
        axes.imshow(draw_people(large, boxes, [""] * len(boxes)).permute(1, 2, 0))
        for box, best in zip(boxes.tolist(), scores.argmax(1).tolist(), strict=True):
            axes.text(*box[:2], names[best + 1], fontsize=6, color="white", va="bottom", clip_on=True)
        axes.axis("off")
    axes = right.subplots()
    places = np.arange(len(names))
    for offset, colour, (asked, (_, precisions)) in zip(
        (0.2, -0.2), ("C0", "C3"), found.items(), strict=False
    ):
        axes.barh(places + offset, [precisions[k] or 0 for k in names], 0.4, color=colour, label=asked)
    axes.axvline(found["scores dealt out at random"][0], color="0.3", linestyle=":", label="chance (mean)")
    axes.set(yticks=places, yticklabels=names.values(), xlabel="average precision at IoU 0.5", xlim=(0, 1))
    figure.legend(fontsize=7, loc="outside lower right", ncols=3)
    figure.savefig(HERE / "action_detection.png", dpi=90)


def processor() -> str:
    """Name and family, as Linux says it."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    facts = {name.strip(): value.strip() for name, value in lines}
    return f"{facts.get('model name', 'a processor')} (family {facts.get('cpu family', '?')})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, help="the films; made where there are none")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="update benchmarks/README.md and the picture")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root, run = arguments.root or Path(folder) / "actions", Path(folder) / "run"
        generate_actions(root)
        command = [sys.executable, "-m", "mvit_video.train", "experiment=motion_actions", f"data.root={root}"]
        settings = [f"trainer.max_epochs={arguments.epochs}", "trainer.enable_progress_bar=false"]
        subprocess.run([*command, *settings, f"hydra.run.dir={run}"], check=True)
        splits = action_splits(root, train_boxes="train.csv", val_boxes="val.csv", class_names="classes.txt")
        # The last one: the best would be chosen by what is measured.
        found, true = measure(run / "checkpoints" / "last.ckpt", splits)
        if arguments.write:
            plot(found, true, splits.names)
    spent = sum(
        use.ru_utime + use.ru_stime
        for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    minutes, count = (time.perf_counter() - start) / 60, len(splits.train.key_frames)
    lines = [
        HEADING,
        "",
        "`python benchmarks/action_detection.py --write`: the nano model learns what each of three things in",
        f"a film does (`experiment=motion_actions`, {arguments.epochs} epochs, seed 0) from {count}",
        f"generated films, and is asked about {len(splits.val.key_frames)} others: {spent / 60:.1f} minutes",
        f"of a processor, films and all ({minutes:.1f} by the clock, where others work too), {processor()},",
        f"torch {torch.__version__}. Chance is what the same scores give, dealt out among all boxes.",
        "",
        "| asked about | mAP at IoU 0.5 |",
        "|---|---|",
        *(f"| {asked} | {mean:.3f} |" for asked, (mean, _) in found.items()),
        "",
        "![what is said of the things in six films, precision of each class](action_detection.png)",
    ]
    section = "\n".join(lines) + "\n"
    print(section)
    if arguments.write:
        write(HEADING, section)


if __name__ == "__main__":
    main()
