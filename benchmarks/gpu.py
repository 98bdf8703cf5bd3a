"""What a machine with an NVIDIA GPU gives: python benchmarks/gpu.py [--output gpu.json]

Needs torch (2.11 or later), numpy, av and hydra-core, and less than nine minutes. Where torchvision,
torchcodec, PyNvVideoCodec or pytest are installed, they are measured beside ours, or run; else their places
stay empty.

Parts, in this order, each a process of its own with a limit of time:
    machine    versions, driver, whether NVDEC works, speed of matrix products
    checks     logits and gradients against the CPU's; NVDEC's planes against the CPU decoder's, bit by bit
    decoding   what a decoder and a clip cost; clips a second by threads, of each engine
    beside     decoding while MViTv2-S trains: threads (both streams) and processes
    difficult  full memory, AV1, damage, tiny pictures, many sizes
    models     clips a second and shares of the matrix speed, with both layouts of poolings and torchvision's
    profile    kernels, gaps, host copies, synchronisations and memory of a step
    compiled   as models, each block by torch.compile
    tests      the tests marked gpu

What fails or finds no time left is null in the JSON, with the reason under "problems". The results are
written after each part, and as tables beside the JSON (.md). ``--device cpu --quick`` tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("SVT_LOG", "1")  # the encoder of AV1 is talkative
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(1, str(ROOT))
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "model")]

import torch  # noqa: E402
from gpu_decoding import check_decoding, decoding, difficult  # noqa: E402
from gpu_models import beside, check_models, matrix_speed, models, profiles  # noqa: E402

from mvit_video.data.decode import choice  # noqa: E402

Json = dict[str, Any]
PACKAGES = ("torch", "torchvision", "numpy", "av", "torchcodec", "PyNvVideoCodec", "pytest", "triton")


class Run:
    """One part's process: what it runs on, how long, and where results go."""

    def __init__(self, device: str, quick: bool, deadline: float, pipe: Connection, folder: Path) -> None:
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        self.quick, self._deadline, self._pipe = quick, deadline, pipe
        self.on_gpu = self.device.type == "cuda"
        self.folder = folder  # for videos

    def left(self) -> float:
        """Seconds until this part should end."""
        return self._deadline - time.monotonic()

    def case(self, key: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Measure and record one thing; None, with the reason, where it fails or no time is left."""
        value, problem = None, None
        if self.left() < 0:
            problem = "out of time"
        else:
            try:
                value = measure(*arguments)
                json.dumps(value, allow_nan=False)  # a number that isn't finite is none
            except Exception as error:
                value, problem = None, reason(error)
        print(f"  {key}: {json.dumps(value) if problem is None else problem}", flush=True)
        self._pipe.send((key, value, problem))
        return value

    def wait(self) -> None:
        """For what is queued on the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], Any], times: int) -> float:
        """Mean of some steps."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            step()
        self.wait()
        return (time.perf_counter() - start) / times


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


# Machine


def machine(run: Run) -> None:
    run.case("versions", lambda: {name: version_of(name) for name in PACKAGES})
    run.case("python", platform.python_version)
    run.case("cpu cores", os.cpu_count)
    for precision in ("bf16", "tf32", "fp32"):
        run.case(f"GFLOP/s {precision}", matrix_speed, run, precision)
    if run.on_gpu:
        run.case("device", torch.cuda.get_device_name)
        run.case("capability", torch.cuda.get_device_capability)
        run.case("gigabytes", lambda: torch.cuda.get_device_properties(0).total_memory / 1e9)
        run.case("CUDA of torch", lambda: torch.version.cuda)
        run.case("driver", lambda: nvidia_smi("driver_version"))
        run.case("power limit", lambda: nvidia_smi("power.limit"))
        run.case("why no NVDEC", lambda: choice.why_no_nvdec(0) or "it works")
        run.case("torch works after a decoder", lambda: torch.ones(3, device=run.device).sum().item() == 3)


def checks(run: Run) -> None:
    check_models(run)
    check_decoding(run)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


# Tests


def tests(run: Run) -> None:
    if importlib.util.find_spec("pytest") is None:
        run.case("tests", lambda: "pytest isn't installed: the checks above stand in for the tests")
        return
    marked = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    arguments = ["-m", "gpu", "--continue-on-collection-errors", *marked]
    if not run.on_gpu:  # a test of the same names that needs nothing
        stand_in = run.folder / "test_stand_in.py"
        stand_in.write_text("def test_stand_in() -> None:\n    assert True\n")
        arguments = ["-c", os.devnull, "--rootdir", str(run.folder), str(stand_in)]
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-o", "addopts=", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    name = line = ""
    for line in process.stdout:  # one by one, so that those that ran count where time runs out
        started, ended = re.match(r"(\S+::\S+)", line), re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        name = started[1] if started is not None else name
        if line.startswith("ERROR ") or (ended is not None and name):
            run.case(name or line.strip(), str, ended[1] if ended is not None else "ERROR")
            name = ""
        elif "clips/s" in line:
            run.case(f"printed by {name}", str, line.strip())
    if process.wait() > 1:  # 1: some tests failed
        raise RuntimeError(f"pytest ended with {process.returncode}: {line.strip()}")


# All parts

# Seconds of each, if none before it took less; a part that still runs GRACE later is ended.
PARTS: dict[str, tuple[Callable[[Run], None], float]] = {
    "machine": (machine, 25),
    "checks": (checks, 60),
    "decoding": (decoding, 75),
    "beside": (beside, 35),
    "difficult": (difficult, 25),
    "models": (models, 100),
    "profile": (profiles, 20),
    "compiled": (functools.partial(models, compiled=True), 110),
    "tests": (tests, 60),
}
GRACE = 10


def run_part(name: str, device: str, quick: bool, deadline: float) -> Json:
    """In a process of its own, which may crash, hang or be too slow."""
    start = time.monotonic()
    found: Json = {"status": "out of time", "results": {}, "problems": {}}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_process, args=(name, device, quick, deadline, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline + GRACE - time.monotonic())):
            key, value, problem = receiver.recv()
            if key == "status":
                found["status"] = value
            else:
                found["results"][key] = value
                if problem is not None:
                    found["problems"][key] = problem
    except EOFError:
        process.join()
        if process.exitcode:
            found["status"] = f"crashed (exit code {process.exitcode})"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return found | {"seconds": time.monotonic() - start}


def in_process(name: str, device: str, quick: bool, deadline: float, sender: Connection) -> None:
    os.setsid()  # so that all that it starts can be ended with it
    if quick:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mvit_gpu_") as folder:
        try:
            PARTS[name][0](Run(device, quick, deadline, sender, Path(folder)))
            status = "done"
        except Exception as error:
            status = f"failed ({reason(error)})"
    sender.send(("status", status, None))


def tables(record: Json) -> str:
    """Markdown of what was measured; an empty cell was not."""
    parts = record["parts"]
    facts = parts.get("machine", {}).get("results", {})
    versions = ", ".join(f"{k} {v}" for k, v in (facts.get("versions") or {}).items() if v)
    about = [f"{facts.get('device') or record['device']}, driver {facts.get('driver')}; {versions}"]
    about += [f"{key}: {facts[key]:,.0f}" for key in facts if key.startswith("GFLOP") and facts[key]]
    lines = ["; ".join(about) + ".", "", "Clips/s (share of the matrix speed), GB that a step needs:", ""]
    lines += ["| | " + " | ".join(COLUMNS) + " | ours / torchvision |", "|---" * (len(COLUMNS) + 2) + "|"]
    for part in ("models", "compiled"):
        for case, row in parts.get(part, {}).get("results", {}).items():
            row = row or {}
            ours, peer = row.get("ours"), row.get("torchvision")
            ratio = f"{ours['clips/s'] / peer['clips/s']:.2f}" if ours and peer else ""
            cells = [speed_cell(row.get(column)) for column in COLUMNS]
            lines.append(f"| {case}{', compiled' * (part == 'compiled')} | {' | '.join(cells)} | {ratio} |")
    for part in ("checks", "decoding", "beside", "difficult", "profile", "tests"):
        lines += ["", f"{part}:", "", "| | |", "|---|---|"]
        for case, value in parts.get(part, {}).get("results", {}).items():
            lines.append(f"| {case} | {plain_cell(value)} |")
    problems = [f"- {part}, {k}: {v}" for part, found in parts.items() for k, v in found["problems"].items()]
    problems += [
        f"- {part}, {case}, {label}: {problem}"
        for part in ("models", "compiled")
        for case, row in parts.get(part, {}).get("results", {}).items()
        for label, problem in (row or {}).get("problems", {}).items()
    ]
    problems += [f"- {part}: {found['status']}" for part, found in parts.items() if found["status"] != "done"]
    return "\n".join([*lines, "", "Not measured:", "", *(problems or ["- nothing"])]) + "\n"


COLUMNS = ("ours", "contiguous", "channels-last", "torchvision")


def speed_cell(row: Json | None) -> str:
    if row is None:
        return ""
    peak = "" if row["peak GB"] is None else f", {row['peak GB']:.1f} GB"
    return f"{row['clips/s']:.1f} ({row['share']:.0%}){peak}"


def plain_cell(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {plain_cell(item)}" for key, item in value.items()).replace("|", "/")
    return (
        "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; can be repeated")
    parser.add_argument("--seconds", type=float, default=sum(seconds for _, seconds in PARTS.values()))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few repetitions")
    arguments = parser.parse_args()
    chosen = arguments.part or list(PARTS)
    scale = arguments.seconds / sum(PARTS[name][1] for name in chosen)
    record: Json = {"device": arguments.device, "quick": arguments.quick, "parts": {}}
    deadline = start = time.monotonic()
    for name in chosen:
        deadline += PARTS[name][1] * scale
        print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
        record["parts"][name] = run_part(name, arguments.device, arguments.quick, deadline)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(tables(record))
    print(f"\n{tables(record)}\nwritten to {arguments.output} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
