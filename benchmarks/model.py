"""Speed and memory of models: python benchmarks/model.py [--rounds 9] [--clock cpu] [--write] [--check]

MViTv2-S 16x4 against torchvision's ``mvit_v2_s`` with the same weights (their logits are compared first), in
turns in one process, as median of the rounds' ratios; both eager and compiled. Peak memory is measured in
processes of their own. Curves follow the number of frames, the crop, the batch and the variant, beside
torchvision, timm (images) and pytorchvideo (MViT v1). ``--clock cpu`` counts the processor's seconds
instead of the clock's, for a machine that others use at the same time.

--write records: tables and curves in README.md, ratios in model.json. --check measures the eager ratios anew
and fails where one is more than a tenth below the recorded one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as mvit_video sets it, which is imported behind torch

import timm
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mvit_video as mv

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "model"))  # others' models with our layout and weights
from peers import pytorchvideo_twin, torchvision_twin  # type: ignore[import-not-found]  # noqa: E402

HEADING = "## Models"
MARGIN = 0.10  # of a ratio, below which --check fails; repeated runs differ by less
SETTINGS = [(step, dtype) for step in ("inference", "training") for dtype in ("float32", "bfloat16")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GMACS = 64.46  # of S 16x4 for one clip
MEMORY = 16  # GB, for which the largest batch is told
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Step = Callable[[], Tensor]


Seconds = dict[str, dict[str, dict[str, float]]]  # curve: point: implementation: seconds
Models = dict[str, nn.Module]


def pair(frames: int = 16, crop: int = 224, *, checkpoint_blocks: bool = False) -> Models:
    """Our S and torchvision's with the same weights, without anything random in training."""
    torch.manual_seed(0)
    ours = mv.create_model(
        "mvitv2_s_16x4",
        num_frames=frames,
        crop_size=crop,
        drop_path=0.0,
        head_dropout=0.0,
        checkpoint_blocks=checkpoint_blocks,
    )
    theirs = torchvision_twin(ours)
    mv.load_weights(ours, theirs.state_dict())
    return {"mvit_video": ours, "torchvision": theirs}


def step_of(model: nn.Module, clips: Tensor, kind: str) -> Step:
    """One inference or one training step (forward and backward) that gives the logits."""
    model.train(kind == "training")

    def infer() -> Tensor:
        with torch.inference_mode():
            return model(clips)

    def train() -> Tensor:
        logits = model(clips)
        logits.float().logsumexp(1).sum().backward()
        model.zero_grad()
        return logits.detach()

    return infer if kind == "inference" else train


def in_turns(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if index:
                seconds[name].append(clock() - start)
    return seconds


def compare(
    kind: str, dtype: str, compiled: bool, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of both and the median of torchvision's time over ours."""
    models = pair()
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(1, 3, 16, 224, 224, generator=generator)
    with torch.inference_mode():
        logits = {name: model.eval()(exact) for name, model in models.items()}
    torch.testing.assert_close(logits["mvit_video"], logits["torchvision"], atol=1e-5, rtol=1e-4)
    clips = exact.to(DTYPES[dtype])
    for model in models.values():
        model.to(DTYPES[dtype])
        if compiled:
            model.compile()
    steps = {name: step_of(model, clips, kind) for name, model in models.items()}
    seconds = in_turns(steps, rounds, clock)
    ours, theirs = seconds["mvit_video"], seconds["torchvision"]
    return {
        "ours": statistics.median(ours),
        "torchvision": statistics.median(theirs),
        "ratio": statistics.median(t / o for o, t in zip(ours, theirs, strict=True)),
    }


def matrix_speed(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """GFLOP/s of the best of ten 2048 x 2048 products by oneDNN (``bmm`` and fp32 MKL may be slower)."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    product: Any = torch.ops.mkldnn._linear_pointwise
    seconds = []
    for _ in range(11):
        start = clock()
        product(a, b, None, "none", [], "")
        seconds.append(clock() - start)
    return 2 * 2048**3 / min(seconds[1:]) / 1e9


def peak_memory(name: str, kind: str, dtype: str, batch: int, checkpointed: bool) -> float:
    """GB above the process with its model, in this process."""
    model = pair(checkpoint_blocks=checkpointed)[name].to(DTYPES[dtype])
    clips = torch.randn(batch, 3, 16, 224, 224, dtype=DTYPES[dtype])
    bare = resident("VmRSS")
    step = step_of(model, clips, kind)
    step()
    step()
    return (resident("VmHWM") - bare) / 2**20


def resident(field: str) -> int:
    """kB of this process, now (VmRSS) or at most (VmHWM); getrusage's peak is inherited from the parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def memory_apart(*case: Any) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--memory", json.dumps(case)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def curve_points(quick: bool) -> Iterator[tuple[str, str, Models, tuple[int, ...]]]:
    """Curve, label of the point, the models in it and the shape of their clips."""
    for frames in (8, 16, 32) if quick else (8, 16, 32, 64):
        yield "frames", str(frames), pair(frames=frames), (1, 3, frames, 224, 224)
    for crop in (160, 224, 320) if quick else (160, 224, 320, 448):
        yield "crop", str(crop), pair(crop=crop), (1, 3, 16, crop, crop)
    for batch in (1, 4) if quick else (1, 4, 16):
        yield "batch", str(batch), pair(), (batch, 3, 16, 224, 224)
    for letter, name in (("t", "tiny"), ("s", "small"), ("b", "base")):
        ours = mv.create_model(f"mvitv2_{letter}_224")
        theirs = timm.create_model(f"mvitv2_{name}")
        mv.load_weights(ours, theirs.state_dict())
        yield "variant", f"{letter.upper()} image", {"mvit_video": ours, "timm": theirs}, (1, 3, 1, 224, 224)
    ours = mv.create_model("mvitv1_b_16x4", separate_qkv=True)
    models = {"mvit_video": ours, "pytorchvideo": pytorchvideo_twin(ours)}
    yield "variant", "v1 B 16x4", models, (1, 3, 16, 224, 224)


def curves(quick: bool, rounds: int, clock: Callable[[], float]) -> Seconds:
    """The fastest of a few inferences in float32 at each point of each curve."""
    found: Seconds = {}
    for curve, label, models, shape in curve_points(quick):
        clips = torch.randn(shape)
        steps = {
            name: step_of(model, clips[:, :, 0] if name == "timm" else clips, "inference")
            for name, model in models.items()
        }
        seconds = {name: min(values) for name, values in in_turns(steps, rounds, clock).items()}
        found.setdefault(curve, {})[label] = seconds
        print(curve, label, {name: round(value, 3) for name, value in seconds.items()}, flush=True)
    return found


def plot(found: Seconds) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.5), layout="constrained")
    for axis, (curve, points) in zip(axes, found.items(), strict=True):
        for name in dict.fromkeys(name for times in points.values() for name in times):
            labels = [label for label, times in points.items() if name in times]
            axis.plot(labels, [points[label][name] for label in labels], marker="o", label=name)
        axis.set(xlabel=curve, ylabel="seconds", yscale="log")
        axis.legend()
    figure.savefig(HERE / "model.png", dpi=100)


def operations(kind: str, dtype: str) -> dict[str, float]:
    """Shares of our model's time by kind of operation."""
    kinds = {
        "matrix products": ("_linear_pointwise", "aten::addmm", "aten::bmm", "aten::mm"),
        "convolutions": ("convolution",),
        "softmax, norms, GELU": ("softmax", "norm", "gelu"),
        "copies, additions": ("copy_", "aten::cat", "aten::add", "aten::mul", "zero", "fill_", "aten::sum"),
    }
    model = pair()["mvit_video"].to(DTYPES[dtype])
    step = step_of(model, torch.randn(1, 3, 16, 224, 224, dtype=DTYPES[dtype]), kind)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    shares = dict.fromkeys([*kinds, "others"], 0.0)
    for event in record.key_averages():
        matching = (name for name, parts in kinds.items() if any(part in event.key for part in parts))
        shares[next(matching, "others")] += event.self_cpu_time_total
    total = sum(shares.values())
    return {name: microseconds / total for name, microseconds in shares.items()}


def machine() -> str:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = (
        "AMX" if capabilities.get("amx_bf16") else "avx512_bf16" if capabilities.get("avx512_bf16") else ""
    )
    name = capabilities.get("cpu_name", "unknown processor")
    return f"{name} {units}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def report(arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The section of README.md, and the ratios by row."""
    clock = CLOCKS[arguments.clock]
    kind_of_seconds = "of the clock" if arguments.clock == "wall" else "of all threads' processor time"
    limits = {name: matrix_speed(dtype, clock) for name, dtype in DTYPES.items()}
    lines = [
        HEADING,
        "",
        f"`python benchmarks/model.py --write` on {machine()}. glibc's allocator with its defaults.",
        "One clip of 16 x 224² through MViTv2-S 16x4 and torchvision's `mvit_v2_s` with the same weights, in",
        f"turns, {arguments.rounds} rounds; seconds {kind_of_seconds}. Matrix products alone reach",
        f"{limits['float32']:.0f} GFLOP/s in float32 and {limits['bfloat16']:.0f} in bfloat16 here; the last",
        "column is the share of that.",
        "",
        "| one clip | ours | torchvision | ratio (median) | share of limit |",
        "|---|---|---|---|---|",
    ]
    ratios: dict[str, float] = {}
    for compiled in (False,) if arguments.quick else (False, True):
        for kind, dtype in SETTINGS:
            row = f"{kind} {dtype}{' compiled' if compiled else ''}"
            found = compare(kind, dtype, compiled, arguments.rounds, clock)
            share = 2 * GMACS * (3 if kind == "training" else 1) / found["ours"] / limits[dtype]
            ratios[row] = round(found["ratio"], 3)
            lines.append(
                f"| {row} | {found['ours']:.2f} s | {found['torchvision']:.2f} s "
                f"| {found['ratio']:.2f} | {share:.0%} |"
            )
            print(lines[-1], flush=True)
    lines += memory_table(ratios)
    lines += ["", "Where our time goes (share by kind of operation):", ""]
    lines += ["| | " + " | ".join(f"{k} {d}" for k, d in SETTINGS) + " |", "|---" * (len(SETTINGS) + 1) + "|"]
    shares = [operations(kind, dtype) for kind, dtype in SETTINGS]
    lines += [f"| {name} | " + " | ".join(f"{s[name]:.0%}" for s in shares) + " |" for name in shares[0]]
    if not arguments.no_curves:
        found_curves = curves(arguments.quick, 2, clock)
        plot(found_curves)
        lines += ["", "![curves](model.png)", "", "| inference, float32 | ours | others |", "|---|---|---|"]
        for curve, points in found_curves.items():
            for label, times in points.items():
                own = times["mvit_video"]
                others = ", ".join(
                    f"{n} {t:.2f} s ({t / own:.2f}x)" for n, t in times.items() if n != "mvit_video"
                )
                lines.append(f"| {curve} {label} | {own:.2f} s | {others} |")
        lines += [
            "",
            "Time grows linearly with the batch. With frames and crop the linear layers and poolings do too,",
            "but attention doesn't: keys are pooled by fixed strides, so queries times keys grow with the",
            "square of the number of tokens. Its memory stays linear, as scores exist only chunk by chunk.",
        ]
    return "\n".join(lines) + "\n", ratios


def memory_table(ratios: dict[str, float]) -> list[str]:
    lines = [
        "",
        f"Peak memory of a training step above the bare process, and the largest batch that {MEMORY} GB hold",
        "(from the slope between batches of one and two):",
        "",
        "| | ours | with `checkpoint_blocks` | torchvision | ours / torchvision | largest batches |",
        "|---|---|---|---|---|---|",
    ]
    cases = (("mvit_video", False), ("mvit_video", True), ("torchvision", False))
    for dtype in DTYPES:
        one, two = ([memory_apart(n, "training", dtype, b, c) for n, c in cases] for b in (1, 2))
        batches = [int((MEMORY - a) / max(b - a, 1e-9)) + 1 for a, b in zip(one, two, strict=True)]
        ratios[f"memory {dtype}"] = round(one[2] / one[0], 3)
        lines.append(
            f"| {dtype} | {one[0]:.2f} GB | {one[1]:.2f} GB | {one[2]:.2f} GB | {one[0] / one[2]:.2f} "
            f"| {', '.join(map(str, batches))} |"
        )
        print(lines[-1], flush=True)
    return lines


def check(recorded: dict[str, float], rounds: int, clock: Callable[[], float]) -> list[str]:
    """What is slower than recorded, each in a line."""
    slower = []
    for kind, dtype in SETTINGS:
        row = f"{kind} {dtype}"
        ratio = compare(kind, dtype, False, rounds, clock)["ratio"]
        print(f"{row}: {ratio:.2f} times torchvision's speed, recorded {recorded[row]:.2f}", flush=True)
        if ratio < recorded[row] * (1 - MARGIN):
            slower.append(f"{row}: {ratio:.2f} is more than {MARGIN:.0%} below {recorded[row]:.2f}")
    return slower


def write(section: str) -> None:
    """Replace this benchmark's section of README.md."""
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(HEADING + "\n")
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{section}{mark}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--quick", action="store_true", help="eager rows and short curves only")
    parser.add_argument("--no-curves", action="store_true", help="no scaling curves")
    parser.add_argument("--write", action="store_true", help="record in README.md and model.json")
    parser.add_argument("--check", action="store_true", help="compare with model.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_memory(*json.loads(arguments.memory)))
        return
    file = HERE / "model.json"
    if arguments.check:
        recorded = json.loads(file.read_text())
        slower = check(recorded["ratios"], arguments.rounds, CLOCKS[arguments.clock])
        if slower:
            sys.exit(f"slower than recorded on {recorded['machine']}:\n" + "\n".join(slower))
        return
    section, ratios = report(arguments)
    print(section)
    if arguments.write:
        write(section)
        file.write_text(json.dumps({"machine": machine(), "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
