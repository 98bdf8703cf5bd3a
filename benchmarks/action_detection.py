"""Whether action detection learns who does what.

python benchmarks/action_detection.py [--root DIR] [--epochs N] [--output FILE]

    The nano model is trained by experiment=motion_actions on films of three things, each with its own motion,
    and asked about the true boxes of the validation films. Then it is asked about the box of another thing in
    the same film each time: a model that looked elsewhere than into the box would be as good.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "datasets" / "motion"))
from generate_actions import generate_actions  # noqa: E402

from mvit_video.action_detection.annotations import KeyFrame, action_splits  # noqa: E402
from mvit_video.action_detection.checkpoint import load_action_detector  # noqa: E402
from mvit_video.action_detection.evaluation import Scored, detections_of, score_people  # noqa: E402
from mvit_video.action_detection.metrics import mean_average_precision  # noqa: E402
from mvit_video.data.decode import open_video  # noqa: E402


def measure(weights: Path, root: Path) -> dict[str, float]:
    """Frame-level mAP at IoU 0.5 with the true boxes, and with those of another thing in their place."""
    splits = action_splits(root, train_boxes="train.csv", val_boxes="val.csv", class_names="classes.txt")
    detector = load_action_detector(weights)
    own = splits.val.key_frames
    asked = {"true boxes": own, "boxes of another thing": tuple(map(shifted, own))}
    found = {}
    for name, frames in asked.items():
        scored = score_people(
            detector,
            frames,
            batch_size=8,
            device="cpu",
            autocast=nullcontext(),
            open_file=open_video,
            num_workers=0,
        )
        # What was seen in another box is said of the own one.
        said = [Scored(frame, scores) for frame, (_, scores) in zip(own, scored, strict=True)]
        found[name], _ = mean_average_precision(
            splits.val.ground_truth, detections_of(said, splits.names), class_ids=splits.names, order="file"
        )
    return found


def shifted(frame: KeyFrame) -> KeyFrame:
    """The key frame with each thing's box moved on to the next thing."""
    return frame._replace(boxes=frame.boxes[1:] + frame.boxes[:1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, help="the films; made where there are none")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, help="a json file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, run = arguments.root or Path(folder) / "actions", Path(folder) / "run"
        generate_actions(root)
        start = time.perf_counter()
        command = [sys.executable, "-m", "mvit_video.train", "experiment=motion_actions", f"data.root={root}"]
        settings = [f"trainer.max_epochs={arguments.epochs}", f"hydra.run.dir={run}"]
        subprocess.run([*command, *settings], check=True)
        figures = {"training minutes": (time.perf_counter() - start) / 60}
        figures |= {f"mAP, {k}": v for k, v in measure(run / "checkpoints" / "best.ckpt", root).items()}
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
