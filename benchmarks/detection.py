"""Time and memory of a detector's backbone with the attentions that the paper compares.

    python benchmarks/detection.py [--model NAME] [--size 800 1216] [--rounds 3] [--quick] [--write]

Each case is an inference of backbone and pyramid on one image in fp32, in a process of its own, so that its
peak memory can be told; cases take turns, and the medians of processor seconds go to the table, since others
may use the machine. "plain" is our own model as detectron2 computes it: by torch's own operations, every head
pooled in a layout of its own, and logits and positions of all pairs as tensors; "plain attention" computes
attention alone so. Their features are compared with ours first. --quick takes a small image and one round;
attention over the whole map without pooling ("full") is left out unless it is named, for it takes minutes at
the paper's size.

    python benchmarks/detection.py --draw demo/detector/checkpoints/best.ckpt demo/shapes/val

Draws what a detector finds in the first pictures of a folder: benchmarks/detection.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from model import machine, resident
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

import mvit_video as mv
from mvit_video.detection.drawing import as_png, grid
from mvit_video.model import kernels
from mvit_video.model.ablations import PaddedWindowAttention
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.config import Grid, floor_divide
from mvit_video.model.positions import relative_index
from mvit_video.model.windows import join_and_crop, pad_and_cut

HERE = Path(__file__).parent
HEADING = "## Detection"
DRAWN = 8  # pictures
WHOLE: dict[str, Any] = {"attention": "pooling", "window_padding": False}
CASES: dict[str, dict[str, Any]] = {
    "pooling + Hwin": {},
    "plain attention": {},
    "plain": {},
    "pooling + Hwin, no FPN": {"fpn": False},
    "pooling": WHOLE,
    "pooling + shifted windows": {"attention": "pooling_shifted_window", "window_padding": False},
    "full": {"attention": "full", "window_padding": False, "kv_strides": ()},
    "joint positions": {"rel_pos_joint": "space"},
    "absolute positions": {"abs_pos": "joint", "rel_pos_spatial": False},
    "no positions": {"rel_pos_spatial": False},
    "torchvision": {},
}
# The paper's run-time table, MViTv2-S on a V100: images a second in testing, GB in training.
PUBLISHED = {
    "pooling": (4.2, 19.5),
    "pooling + shifted windows": (9.2, 4.9),
    "pooling + Hwin": (9.4, 5.2),
}


def plain_forward(self: PoolingAttention, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """``PoolingAttention.forward`` with a bias of every pair of query and key (no class token)."""
    assert self.qkv is not None
    heads, window = self.num_heads, self.plan.window
    parts = self.qkv(x).unflatten(2, (3, heads, -1)).unbind(2)  # each (B, N, n, c)
    pooled, grids = [], []
    for name, part in zip("qkv", parts, strict=True):
        volume = part.unflatten(1, grid).permute(0, 4, 5, 1, 2, 3).flatten(0, 1)  # (B*n, c, T, H, W)
        volume = getattr(self, f"pool_{name}")(volume.contiguous())
        t, h, w = volume.shape[2:]
        cells = volume.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(0, (-1, heads)).transpose(1, 2)
        pooled.append(getattr(self, f"norm_{name}")(cells))
        grids.append((t, h, w))
    q, k, v = pooled
    residual, (q_grid, k_grid, _) = q, grids
    q_window, k_window = q_grid, k_grid
    if isinstance(self, PaddedWindowAttention) and window is not None:
        q_window, k_window = (floor_divide(window, s) for s in (self.plan.q_stride, self.plan.kv_stride))
        q, k, v = pad_and_cut(q, q_grid, q_window), *(pad_and_cut(y, k_grid, k_window) for y in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, n, N, c)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = _with_positions(self, logits, q, q_window[1:], k_window[1:])
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    if q_window != q_grid:
        out = join_and_crop(out, q_grid, q_window)
    return self.proj((out + residual).flatten(2)), q_grid


def _with_positions(
    attention: PoolingAttention, logits: Tensor, q: Tensor, q_grid: Any, k_grid: Any
) -> Tensor:
    cells = q.unflatten(2, tuple(q_grid))  # (B, n, H, W, c)
    both = []
    for name, queries, keys, of in (
        ("h", q_grid[0], k_grid[0], "bnhwc,hkc->bnhwk"),
        ("w", q_grid[1], k_grid[1], "bnhwc,wkc->bnhwk"),
    ):
        table = getattr(attention, f"rel_pos_{name}")
        length = 2 * max(queries, keys) - 1
        if len(table) != length:
            table = torch.nn.functional.interpolate(table.T[None], length, mode="linear")[0].T
        both.append(torch.einsum(of, cells, table[relative_index(queries, keys)]))
    pairs = logits.unflatten(3, tuple(k_grid)).unflatten(2, tuple(q_grid))
    return (pairs + both[0][..., :, None] + both[1][..., None, :]).flatten(4).flatten(2, 3)


def backbone_of(case: str, model: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if case == "torchvision":
        return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).backbone.eval()
    backbone = mv.create_detector(model, **CASES[case]).backbone.eval()
    for name, parameter in backbone.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.trunc_normal_(parameter, std=0.02)
    return backbone


def measure(case: str, model: str, size: tuple[int, int]) -> dict[str, float]:
    """Processor seconds of an inference and peak memory above the bare process (MB), in this process."""
    backbone = backbone_of(case, model)
    image = torch.randn(1, 3, *size)
    if case.startswith("plain"):
        PoolingAttention.forward = plain_forward  # type: ignore[method-assign]
    with torch.inference_mode(), kernels.plain() if case == "plain" else contextlib.nullcontext():
        small = torch.randn(1, 3, 64, 96)
        backbone(small)
        bare = resident("VmRSS")
        start = time.process_time()
        backbone(image)
        seconds = time.process_time() - start
    return {"seconds": seconds, "megabytes": (resident("VmHWM") - bare) / 1024}


def check_plain(model: str, size: tuple[int, int]) -> float:
    """How far the features of the plain form are from ours, at most."""
    backbone, image = backbone_of("pooling + Hwin", model), torch.randn(1, 3, *size)
    ours, forward = backbone(image), PoolingAttention.forward
    PoolingAttention.forward = plain_forward  # type: ignore[method-assign]
    try:
        plain = backbone(image)
    finally:
        PoolingAttention.forward = forward  # type: ignore[method-assign]
    return max(float((ours[name] - plain[name]).abs().max()) for name in ours)


def measured_apart(case: str, model: str, size: tuple[int, int]) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, "--model", model, "--size", *map(str, size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Lines of Markdown; ratios are to the first row."""
    first = next(iter(found.values()))
    lines = [
        "| backbone | processor s | MB | time and memory of ours | paper, V100: images/s, training GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        ratios = ", ".join(f"{row[key] / first[key]:.2f}x" for key in ("seconds", "megabytes"))
        published = "{}, {}".format(*PUBLISHED[name]) if name in PUBLISHED else ""
        lines.append(f"| {name} | {row['seconds']:.2f} | {row['megabytes']:.0f} | {ratios} | {published} |")
    return lines


def draw(weights: str, folder: str) -> None:
    recognizer = mv.ObjectRecognizer(weights)
    files = sorted(Path(folder).glob("*.png"))[:DRAWN]
    pictures = [found.draw() for found in recognizer.predict(files)]
    (HERE / "detection.png").write_bytes(as_png(grid(pictures)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="mask_rcnn_mvitv2_t")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1216], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[n for n in CASES if n != "full"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="the table into benchmarks/README.md")
    parser.add_argument("--draw", nargs=2, metavar=("WEIGHTS", "FOLDER"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size: tuple[int, int] = (64, 96) if arguments.quick else tuple(arguments.size)
    if arguments.draw:
        draw(*arguments.draw)
        return
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.model, size)))
        return
    with torch.inference_mode():
        difference = check_plain(arguments.model, (128, 192))
    assert difference < 1e-3, difference
    rounds = [
        {case: measured_apart(case, arguments.model, size) for case in arguments.cases}
        for _ in range(1 if arguments.quick else arguments.rounds)
    ]
    found = {
        case: {key: statistics.median(r[case][key] for r in rounds) for key in ("seconds", "megabytes")}
        for case in arguments.cases
    }
    about = (
        f"`python benchmarks/detection.py`: {arguments.model}, {size[0]} x {size[1]} pixels, fp32, "
        f"{machine()}, torch {torch.__version__}; medians of {len(rounds)} turns; "
        f"features of the plain form differ by {difference:.1e}."
    )
    lines = [about, "", *table(found)]
    print("\n".join(lines))
    if arguments.write:
        page = HERE / "README.md"
        before, _, after = page.read_text().partition(f"\n{HEADING}\n")
        rest = after[after.find("\n## ") :] if "\n## " in after else ""
        page.write_text("\n".join([before.rstrip("\n"), "", HEADING, "", *lines]) + "\n" + rest)


if __name__ == "__main__":
    main()
