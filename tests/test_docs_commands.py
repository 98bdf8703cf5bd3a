"""Every command and every Python block of the documentation runs: small data, small models, few steps.

What is new in the documentation fails here until it runs, or until ``CONFIGURATION_ONLY`` says why it can't.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import generate as motion
import pytest
import torch
from conftest import Command
from generate_actions import generate_actions
from make_shapes import generate as generate_shapes
from PIL import Image
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.detection import save_detector
from mvit_video.weights import METADATA_KEY, model_metadata, save_weights

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "configuration.md"),
    *sorted(ROOT.glob("datasets/*/README.md")),
    ROOT / "benchmarks/README.md",
]

NAMED = {str(page.relative_to(ROOT)): page for page in PAGES}
FAST = ("docs/checkpoints.md", "docs/testing.md", "benchmarks/README.md")

CONFIGURATION_ONLY = {  # what a command has -> why it is composed and checked, but not run
    "rtsp://": "needs a camera; streams are in test_live.py",
    "/dev/video0": "needs a camera",
    "ray_address=auto": "needs a cluster; Ray on this machine is in test_ray.py",
    "compiled=true": "takes a C++ compiler and minutes; in test_export.py",
    "output=speed.json": "takes a minute and a half; in test_info.py",
    "compile=true": "takes minutes; in test_recipe.py and test_inference.py",
    "model.weights=kinetics400": "needs the network and published weights",
    "hf://": "needs the network; models of the Hub are in test_hub.py",
    "sweeper=optuna": "needs an extra; sweeps by Optuna are in test_processes.py",
    "experiment=ava_": "needs AVA and weights; films of things are in test_action_commands.py",
    "data=motion_actions": "needs weights of its task; in test_action_commands.py",
    "data=ava": "needs AVA; films of things are in test_action_commands.py",
    "persons": "needs films of people; those of things are in test_action_commands.py",
    "submitit_slurm": "needs Slurm; sweeps by submitit are in test_processes.py",
    "experiment=finetune_detector": "is of the published size; in test_detection_commands.py",
    "experiment=coco_": "is of the published size; in test_detection_metrics.py",
    "weights=model_final.pkl": "needs published weights; such files are in test_detector.py",
}
NOT_RUN = {  # other programs: what a line starts with -> why it isn't run
    "make ": "sets up an environment of its own; the target must exist",
    "pip install ": "needs the network; the extra must exist",
    "python benchmarks/": "takes minutes; the file must exist",
    "python datasets/cvat/": "needs an export; such files are in test_annotations.py",
    "docker ": "needs Docker; the Dockerfile is read by test_docker.py",
}
SMALL_MODEL = {"embed_dim": 32, "stages": [1, 1], "crop_size": 32, "kv_stride": [1, 4, 4]}
SMALL_DETECTOR = {"embed_dim": 8, "stages": [1, 1, 1, 1], "kv_strides": [], "channels": 8}
SMALL = {
    "train": [
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
        "trainer.limit_val_batches=1",
        "trainer.enable_progress_bar=false",
        "trainer.num_sanity_val_steps=0",
        "batch_size=2",
        "num_workers=0",
        "logger=csv",
    ],
    "eval": ["num_workers=0"],
    "predict": ["num_workers=0"],
    "data": ["num_workers=1"],
    "export": ["runs=1", "batch_size=2"],
}


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            yield Block(lines[start][3:], start + 2, "\n".join(lines[start + 1 : number]))
            start = None


def command_lines(page: Path) -> list[tuple[int, str]]:
    """Line numbers and commands: all lines of shell blocks, and commands with arguments amid the text."""
    found = []
    for block in blocks(page):
        begun = ""  # a line that ends with a backslash goes on in the next
        for number, line in enumerate(block.text.splitlines() if block.language == "sh" else []):
            begun += line.removesuffix("\\")
            if not line.endswith("\\"):
                found.append((block.line + number, begun))
                begun = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        found += [
            (number, text) for text in re.findall(r"`(mvit-\w+ [^`]*=[^`]*|(?:make|python) [^`]+)`", line)
        ]
    return sorted(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_from_these_tests(page: Path) -> None:
    """Shell and Python are in blocks that say so; other blocks hold no command."""
    for block in blocks(page):
        assert block.language in ("sh", "python", "yaml", ""), f"line {block.line}: {block.language}"
        if block.language in ("", "yaml"):
            assert not re.search(r"^\s*(\$ )?mvit-\w+ |^\s*(\$ )?torchrun ", block.text, re.M), block.line
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^(    |\t)(mvit-|torchrun |make |python |pip )", text, re.M)


def test_every_exception_is_needed() -> None:
    lines = [line for page in PAGES for _, line in command_lines(page)]
    for part in CONFIGURATION_ONLY:
        assert any(part in line for line in lines), part
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if name in FAST else [pytest.mark.slow]) for name, page in NAMED.items()],
    ids=NAMED,
)
def test_every_block_runs(page: Path, world: Path, tmp_path: Path, run_line: Any, run_python: Any) -> None:
    """In the order of the page, from a folder that has what the page speaks of."""
    shutil.copytree(world, tmp_path, symlinks=True, dirs_exist_ok=True)
    for block in blocks(page):
        if block.language == "yaml":
            target = tmp_path / re.findall(r"^# (\S+\.yaml)", block.text, re.M)[0]
            target.parent.mkdir(parents=True)
            target.write_text(block.text)
    work = [(line, run_line, text) for line, text in command_lines(page)]
    work += [(block.line, run_python, block.text) for block in blocks(page) if block.language == "python"]
    for line, run, text in sorted(work, key=lambda item: item[0]):
        print(f"{page.relative_to(ROOT)}, line {line}: {text}")  # shown where it fails
        run(text)


@pytest.fixture
def run_python() -> Any:
    def run(code: str) -> None:
        with contextlib.redirect_stdout(None):
            exec(compile(code, "documentation", "exec"), {"clips": torch.rand(1, 3, 16, 224, 224)})

    return run


@pytest.fixture
def run_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a line of shell as far as it can be here; a command that ends with an error fails."""
    monkeypatch.setattr("mvit_video.cli.demo.launch", lambda *_, **__: None)  # it would serve for ever
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(line: str) -> None:
        if any(line.startswith(start) for start in NOT_RUN):
            exists(line)
            return
        lexer = shlex.shlex(newest_run(line).replace("=/", "="), posix=True, punctuation_chars="|>")
        lexer.whitespace_split = True
        words = list(lexer)
        if not words:
            return
        output = words.pop() if ">" in words else None
        words = [word for word in words if word != ">"]
        first, _, last = " ".join(map(shlex.quote, words)).rpartition(" '|' ")
        with piped(first):
            result = run_words(shlex.split(last))
        assert result.code == 0, result.err
        assert output is None or result.out

    def run_words(words: list[str]) -> Any:
        if words[0] == "python":
            if words[1] == "datasets/shapes/make_shapes.py":
                for split in ("train", "val"):
                    generate_shapes(Path(words[3]), split, 2)
            elif words[1] == "datasets/motion/generate.py":
                motion.generate(words[3], train_per_class=2, val_per_class=1, size=48)
            elif words[1] == "datasets/motion/generate_actions.py":
                generate_actions(words[3], train=4, val=2, size=48)
            else:
                subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], check=True)
            return command("info", "system")
        if words[0] == "sbatch":
            words = shlex.split(words[words.index("--wrap") + 1])[1:]  # behind srun
        if words[0] == "torchrun":
            module = words.index("-m") + 1
            words = [words[module].replace("mvit_video.", "mvit-"), *words[module + 1 :]]
        name = words[0].removeprefix("mvit-")
        arguments = [re.sub("^follow=.*", "follow=0.5", word) for word in words[1:]]
        if any(part in argument for part in CONFIGURATION_ONLY for argument in arguments):
            of_sweeps = ("--multirun", "hydra/sweeper", "hydra.sweeper")
            single = [word for word in arguments if not word.startswith(of_sweeps) and "," not in word]
            return command(name, *single, "--cfg", "job")
        if "--cfg" in arguments:
            return command(name, *arguments)
        if "resume=last" in arguments:  # as if one had been killed at its start
            (max(Path("outputs/eval").glob("*/*")) / "unfinished").mkdir()
        chosen = [argument for argument in arguments if argument.startswith(("model=", "experiment="))]
        if name == "train" or (chosen and name != "info"):
            small = SMALL_DETECTOR if "experiment=shapes" in arguments else SMALL_MODEL
            arguments += [f"model.{key}={value}".replace(" ", "") for key, value in small.items()]
            if small is SMALL_DETECTOR:
                arguments.append("trainer.check_val_every_n_epoch=1")
        if any(choice.startswith("experiment=maskfeat") and not choice.endswith("_ft") for choice in chosen):
            arguments.append("masking.cell=16")
        return command(name, *arguments, *SMALL.get(name, []))

    return run


def exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "pip":
        for extra in re.findall(r"\[(\w+)\]", line):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        assert words[2] == "." or words[2].startswith("mvit-video")
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert (ROOT / "Dockerfile").is_file()


def newest_run(line: str) -> str:
    """DATE/TIME in a path stands for the folder of the run before."""
    runs = sorted(Path("outputs/train").glob("*/*"))
    return line.replace("DATE/TIME", "/".join(runs[-1].parts[-2:])) if runs else line


@contextlib.contextmanager
def piped(line: str) -> Iterator[None]:
    """Standard input is what a command writes; FFmpeg's is a stream that lies ready."""
    if not line:
        yield
        return
    if line.startswith("ffmpeg "):
        Path("piped").write_bytes(Path("recording.ts").read_bytes())
    else:
        Path("piped").write_bytes(subprocess.run(shlex.split(line), capture_output=True, check=True).stdout)
    before, stdin = os.dup(0), sys.stdin
    try:
        with open("piped", encoding="utf-8") as file:  # noqa: PTH123
            os.dup2(file.fileno(), 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        sys.stdin = stdin


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, two_classes: Path) -> Path:
    """A folder with all that the documentation speaks of; ``/data`` and ``/shared`` lie in it, too."""
    root = tmp_path_factory.mktemp("world")
    mp4, webm = two_classes / "cats" / "5.mp4", two_classes / "dogs and birds" / "5.webm"
    for folder in ("videos", "folder"):
        shutil.copytree(two_classes, root / folder)
    (root / "more" / "deep").mkdir(parents=True)
    shutil.copy(webm, root / "more" / "deep")
    for name in ("new", "match", "long", "a"):
        shutil.copy(mp4, root / f"{name}.mp4")
    write_numbered_video(root / "recording.ts", 100, fps=25, height=48, width=64, options={"g": "10"})
    for name in ("list", "all"):
        (root / f"{name}.txt").write_text("new.mp4\nvideos/cats\n")
    rows = [(f"videos/cats/{n}.mp4", 0) for n in (0, 1)] + [
        (f"videos/dogs and birds/{n}.webm", 1) for n in (0, 1)
    ]
    for name in ("train", "val"):
        (root / f"{name}.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
        listed = [{"path": path, "label": label} for path, label in rows]
        (root / f"{name}.json").write_text(json.dumps(listed))
    clips = [(f"recordings/{name}/g{n}/v_g{n}_c1.mp4", name) for name in ("cats", "dogs") for n in (1, 2)]
    for path, _ in clips:
        (root / path).parent.mkdir(parents=True)
        shutil.copy(mp4, root / path)
    (root / "all.csv").write_text("".join(f"{path},{name}\n" for path, name in clips))
    (root / "actions.csv").write_text("".join(f"{path},{name};pets\n" for path, name in clips))
    for name in ("best.ckpt", "other.ckpt", "shared/best.ckpt"):
        write_checkpoint(root / name, ("cats", "dogs and birds"))
    write_checkpoint(root / "demo/train/checkpoints/best.ckpt", tuple(sorted(motion.CLASSES)))
    kinetics = mv.create_model("mvitv2_s_16x4", **SMALL_MODEL)
    for name in ("k400.pyth", "FILE", "MViTv2_S_16x4.pyth", "bare.safetensors"):
        save_weights(kinetics, root / name)
    motion.generate(root / "demo/motion", train_per_class=2, val_per_class=1, size=48)
    write_data_sets(root / "data", mp4, webm)
    write_objects(root)
    return root


def write_objects(root: Path) -> None:
    """Labelled images, COCO, a detector, a picture and a video."""
    for folder in ("photos", "data/coco"):
        (root / folder).mkdir(parents=True)
        for split in ("train", "val"):
            generate_shapes(root / folder, split, 2)
    for split in ("train", "val"):
        coco = root / "data" / "coco"
        (coco / "annotations" / f"{split}.json").rename(coco / "annotations" / f"instances_{split}2017.json")
        (coco / split).rename(coco / f"{split}2017")
    detector = mv.create_detector("mask_rcnn_mvitv2_nano", num_classes=3, **SMALL_DETECTOR)
    save_detector(detector, root / "detector.ckpt")
    Image.open(root / "photos" / "val" / "00000.png").save(root / "street.jpg")
    shutil.copy(root / "a.mp4", root / "video.mp4")


def write_checkpoint(path: Path, class_names: tuple[str, ...]) -> None:
    model = mv.create_model("mvitv2_nano_8x4", num_classes=len(class_names), num_frames=4, **SMALL_MODEL)
    model.class_names = class_names
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, METADATA_KEY: model_metadata(model)}, path)


def write_data_sets(root: Path, mp4: Path, webm: Path) -> None:
    """Each in one of its layouts, with two classes and two videos of each in a split."""

    def put(source: Path, *names: str) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / name)

    for folder in ("train/abseiling", "train/archery", "val/abseiling", "val/archery"):
        put(mp4, f"k400/{folder}/0.mp4", f"k400/{folder}/1.mp4")

    put(mp4, "unlabelled/0.mp4", "unlabelled/deep/er/1.mp4", "unlabelled/deep/2.mp4")

    put(webm, *(f"ssv2/20bn-something-something-v2/{n}.webm" for n in range(4)))
    labels = ("Putting [something] into [something]", "Closing [something]")
    for name, ids in (("train", (0, 1)), ("validation", (2, 3))):
        rows = [{"id": str(n), "template": labels[n % 2], "label": "x"} for n in ids]
        (root / "ssv2" / f"{name}.json").write_text(json.dumps(rows))

    actions = ("ApplyEyeMakeup", "Archery")
    videos = [f"{action}/v_{action}_g0{n}_c01.avi" for n in (1, 2) for action in actions]
    put(mp4, *(f"ucf101/UCF-101/{video}" for video in videos))
    lists = root / "ucf101" / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (lists / "trainlist01.txt").write_text(f"{videos[0]} 1\n{videos[1]} 2\n")
    (lists / "testlist01.txt").write_text("\n".join(videos[2:]))

    lists = root / "hmdb51" / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for action in ("brush_hair", "clap"):
        put(mp4, f"hmdb51/{action}/a.avi", f"hmdb51/{action}/b.avi")
        (lists / f"{action}_test_split1.txt").write_text("a.avi 1\nb.avi 2\n")

    for folder in ("train/n01440764", "train/n01443537", "val/n01440764", "val/n01443537"):
        (root / "imagenet" / folder).mkdir(parents=True)
        for n in (0, 1):
            noise = Image.effect_noise((60, 50), 90 + n).convert("RGB")
            noise.save(root / "imagenet" / folder / f"{n}.JPEG")
