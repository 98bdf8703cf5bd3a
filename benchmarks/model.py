"""Speed and memory of models: python benchmarks/model.py [--part PART] [--rounds 9] [--write] [--check]

Parts (all, if none is named):
    eager       MViTv2-S 16x4 against torchvision's ``mvit_v2_s`` with the same weights (their logits are
                compared first), in turns in one process, as median of the rounds' ratios
    compiled    the same by torch.compile on both sides; compiling takes some minutes
    memory      peaks of a training step, in processes of their own
    operations  where our time goes
    curves      time and memory by number of frames, crop, batch and variant, beside torchvision, timm
                (images) and pytorchvideo (MViT v1)

``--clock cpu`` counts the processor's seconds instead of the clock's, for a machine that others use at the
same time. The headline is the share of what the machine's matrix units give: the model's FLOPs over its time,
over the speed of a product of 2048 x 2048 matrices by oneDNN, which takes turns with the models, as median of
the rounds. (MKL's fp32 products, torch's default, are a fifth slower on AMD's cores: they are no limit.)
--write records the parts in model.json, by kind of machine, and in model.png and README.md. --check measures
the eager part anew and fails where a share or a ratio is more than a tenth below the one recorded for this
kind of machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
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
PARTS = ("eager", "compiled", "memory", "operations", "curves")
MARGIN = 0.10  # of a ratio, below which --check fails; repeated runs differ by less
SETTINGS = [(step, dtype) for step in ("inference", "training") for dtype in ("float32", "bfloat16")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GMACS = 64.46  # of S 16x4 for one clip
MATRIX = 2048  # rows and columns of the product that the share is of
MEMORY = 16  # GB, for which the largest batch is told
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Step = Callable[[], Tensor]


Curves = dict[str, dict[str, dict[str, list[float]]]]  # curve: point: implementation: seconds, GB
Record = dict[str, Any]  # part: what was measured
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
    """Seconds of both, the median of torchvision's time over ours, and shares of the matrix speed."""
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
    seconds = in_turns(steps | {"matrix": matrix_product(DTYPES[dtype])}, rounds, clock)
    ours, theirs, product = (seconds[name] for name in ("mvit_video", "torchvision", "matrix"))
    products = GMACS * 1e9 * (3 if kind == "training" else 1) / MATRIX**3  # as many as the model's FLOPs
    return {
        "ours": statistics.median(ours),
        "torchvision": statistics.median(theirs),
        "ratio": statistics.median(t / o for o, t in zip(ours, theirs, strict=True)),
        "share": statistics.median(products * p / o for o, p in zip(ours, product, strict=True)),
        "torchvision_share": statistics.median(
            products * p / t for t, p in zip(theirs, product, strict=True)
        ),
    }


def matrix_product(dtype: torch.dtype) -> Step:
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    product: Any = torch.ops.mkldnn._linear_pointwise
    return lambda: product(a, b, None, "none", [], "")


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


def curve_points() -> Iterator[tuple[str, str, Models, tuple[int, ...]]]:
    """Curve, label of the point, the models in it and the shape of their clips."""
    for frames in (8, 16, 32, 64):
        yield "frames", str(frames), pair(frames=frames), (1, 3, frames, 224, 224)
    for crop in (160, 224, 320, 448):
        yield "crop", str(crop), pair(crop=crop), (1, 3, 16, crop, crop)
    for batch in (1, 4, 16):
        yield "batch", str(batch), pair(), (batch, 3, 16, 224, 224)
    for letter, name in (("t", "tiny"), ("s", "small"), ("b", "base")):
        ours = mv.create_model(f"mvitv2_{letter}_224")
        theirs = timm.create_model(f"mvitv2_{name}")
        mv.load_weights(ours, theirs.state_dict())
        yield "variant", f"{letter.upper()} image", {"mvit_video": ours, "timm": theirs}, (1, 3, 1, 224, 224)
    ours = mv.create_model("mvitv1_b_16x4", separate_qkv=True)
    models = {"mvit_video": ours, "pytorchvideo": pytorchvideo_twin(ours)}
    yield "variant", "v1 B 16x4", models, (1, 3, 16, 224, 224)


def measure_curves(clock: Callable[[], float]) -> Curves:
    """The faster of two inferences in float32 at each point of each curve, and its memory."""
    found: Curves = {}
    for curve, label, models, shape in curve_points():
        clips = torch.randn(shape)
        steps = {
            name: step_of(model, clips[:, :, 0] if name == "timm" else clips, "inference")
            for name, model in models.items()
        }
        memory = {name: added_memory(step) for name, step in steps.items()}
        times = in_turns(steps, 2, clock)
        point = {name: [round(min(times[name]), 3), round(memory[name], 3)] for name in steps}
        found.setdefault(curve, {})[label] = point
        print(curve, label, point, flush=True)
    return found


def added_memory(step: Step) -> float:
    """GB that a step needs above what the process holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 2**20


def plot(found: Curves) -> None:
    figure, axes = plt.subplots(
        2, len(found), figsize=(4 * len(found), 6), layout="constrained", sharex="col"
    )
    for column, (curve, points) in zip(axes.T, found.items(), strict=True):
        for row, (axis, unit) in enumerate(zip(column, ("seconds", "GB"), strict=True)):
            for name in dict.fromkeys(name for point in points.values() for name in point):
                labels = [label for label, point in points.items() if name in point]
                axis.plot(labels, [points[label][name][row] for label in labels], marker="o", label=name)
            axis.set(ylabel=unit, yscale="log")
        column[0].legend()
        column[1].set(xlabel=curve)
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
    """The kind of machine that figures are compared on."""
    info = Path("/proc/cpuinfo").read_text()
    name, family = (
        match[1].strip() if (match := re.search(rf"^{field}\s*:(.*)$", info, re.M)) else "unknown"
        for field in ("model name", "cpu family")
    )
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = next((u for u in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if capabilities.get(u)), "")
    return f"{name} (family {family}, {units}), {torch.get_num_threads()} threads"


def measure(part: str, rounds: int, clock: Callable[[], float]) -> Any:
    if part == "memory":
        return measure_memory()
    if part == "operations":
        return {f"{kind} {dtype}": operations(kind, dtype) for kind, dtype in SETTINGS}
    if part == "curves":
        return measure_curves(clock)
    found = {}
    for kind, dtype in SETTINGS:
        row = compare(kind, dtype, part == "compiled", rounds, clock)
        found[f"{kind} {dtype}"] = {name: round(value, 3) for name, value in row.items()}
        print(part, kind, dtype, found[f"{kind} {dtype}"], flush=True)
    return found


def measure_memory() -> dict[str, dict[str, list[float]]]:
    """dtype: case: GB of a training step of one clip and of two."""
    cases = {"ours": ("mvit_video", False), "ours, checkpoint_blocks": ("mvit_video", True)}
    cases["torchvision"] = ("torchvision", False)
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in DTYPES:
        found[dtype] = {}
        for case, (name, checkpointed) in cases.items():
            used = [memory_apart(name, "training", dtype, batch, checkpointed) for batch in (1, 2)]
            found[dtype][case] = [round(gigabytes, 3) for gigabytes in used]
        print("memory", dtype, found[dtype], flush=True)
    return found


def render(records: dict[str, Record], machine: str) -> str:
    """The section of README.md: all machines side by side, and all parts of one of them."""
    record = records[machine]
    lines = [HEADING, ""]
    lines += [
        "One clip of 16 x 224² through MViTv2-S 16x4 and torchvision's `mvit_v2_s`, same weights: the share",
        "of what the machine's matrix units give (ours, torchvision's), and torchvision's time over ours.",
        "",
        "| | " + " | ".join(" ".join(name) for name in SETTINGS) + " |",
        "|---" * (len(SETTINGS) + 1) + "|",
    ]
    for name, found in records.items():
        cells = [
            f"{row['share']:.2f}, {row['torchvision_share']:.2f}; {row['ratio']:.2f}x"
            for row in found["eager"].values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"`python benchmarks/model.py --write` on {machine}, torch {record['torch']}."]
    lines += [
        "glibc's allocator with its defaults; threads of OpenMP spin for tens of microseconds before they",
        "sleep, as they do where `mvit_video` is imported before torch.",
    ]
    titles = {
        "eager": "One clip of 16 x 224² through MViTv2-S 16x4 and torchvision's `mvit_v2_s`, same weights:",
        "compiled": "Both by `torch.compile`:",
    }
    for part, title in titles.items():
        if part in record:
            lines += ["", title, "", "| | ours | torchvision | ratio (median) | share of matrix units |"]
            lines += ["|---|---|---|---|---|"]
            lines += [
                f"| {name} | {row['ours']:.2f} s | {row['torchvision']:.2f} s | {row['ratio']:.2f} "
                f"| {row['share']:.0%} |"
                for name, row in record[part].items()
            ]
    if "memory" in record:
        lines += [
            "",
            "Peak memory of a training step of one clip above the process with its model, and the largest",
            f"batch that {MEMORY} GB hold (from the slope between batches of one and two):",
            "",
            "| | GB | of torchvision's | largest batch |",
            "|---|---|---|---|",
        ]
        for dtype, cases in record["memory"].items():
            for case, (one, two) in cases.items():
                share = one / cases["torchvision"][0]
                largest = int((MEMORY - one) / (two - one)) + 1
                lines.append(f"| {case}, {dtype} | {one:.2f} | {share:.2f} | {largest} |")
    if "operations" in record:
        columns = record["operations"]
        lines += ["", "Where our time goes (share by kind of operation):", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in next(iter(columns.values())):
            lines.append(
                f"| {name} | " + " | ".join(f"{shares[name]:.0%}" for shares in columns.values()) + " |"
            )
    if "curves" in record:
        lines += ["", "![curves](model.png)", "", "| inference, float32 | ours | others |", "|---|---|---|"]
        for curve, points in record["curves"].items():
            for label, point in points.items():
                seconds, gigabytes = point["mvit_video"]
                others = "; ".join(
                    f"{name} {other:.2f} s ({other / seconds:.2f}x), {more:.2f} GB"
                    for name, (other, more) in point.items()
                    if name != "mvit_video"
                )
                lines.append(f"| {curve} {label} | {seconds:.2f} s, {gigabytes:.2f} GB | {others} |")
        lines += [
            "",
            "Time grows linearly with the batch. With frames and crop the linear layers and poolings do too,",
            "but attention doesn't: keys are pooled by fixed strides, so queries times keys grow with the",
            "square of the number of tokens. Its memory stays linear, as scores exist only chunk by chunk.",
        ]
    lines += [
        "",
        "In float32 much of the lead comes from oneDNN's products, on AMD's processors twice as fast as",
        "MKL's. In bfloat16 torchvision's products are oneDNN's already, so the lead is attention's and the",
        "poolings', and it is the smaller the slower a processor's bfloat16 products are beside the rest.",
    ]
    return "\n".join(lines) + "\n"


def check(recorded: dict[str, dict[str, float]], rounds: int, clock: Callable[[], float]) -> list[str]:
    """What is slower than recorded, each in a line."""
    slower = []
    for name, row in measure("eager", rounds, clock).items():
        for figure in ("share", "ratio"):
            found, expected = row[figure], recorded[name][figure]
            if found < expected * (1 - MARGIN):
                slower.append(f"{name}: {figure} {found:.2f} is more than {MARGIN:.0%} below {expected:.2f}")
    return slower


def write(section: str) -> None:
    """Replace this benchmark's section of README.md."""
    path = HERE / "README.md"
    before, _, rest = path.read_text().partition(HEADING + "\n")
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{section}{mark}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--write", action="store_true", help="record in README.md and model.json")
    parser.add_argument("--check", action="store_true", help="compare with model.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(peak_memory(*json.loads(arguments.memory)))
        return
    clock = CLOCKS[arguments.clock]
    file = HERE / "model.json"
    records: dict[str, Record] = json.loads(file.read_text())
    here = machine()
    if arguments.check:
        if here not in records:
            known = "".join(f"\n  {name}" for name in records)
            print(f"no figures are recorded for {here}, so nothing is compared; there are those of{known}")
            return
        slower = check(records[here]["eager"], arguments.rounds, clock)
        if slower:
            sys.exit(f"slower than recorded on {here}:\n" + "\n".join(slower))
        return
    record = records.setdefault(here, {})
    record["torch"] = torch.__version__
    for part in arguments.part or PARTS:
        record[part] = measure(part, arguments.rounds, clock)
        if arguments.write:
            file.write_text(json.dumps(records, indent=2) + "\n")
            write(render(records, here))
            if part == "curves":
                plot(record[part])
    print(render(records, here))


if __name__ == "__main__":
    main()
