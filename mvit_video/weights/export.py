"""A model as one file that runs without this package: ONNX, or a program of PyTorch's.

The file carries what a checkpoint does: its metadata ``mvit_video`` is JSON with ``config``, ``protocol``
(frames, stride, crop, mean and std) and ``class_names``, and ``multi_label`` where a clip may be of several.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvit_video.errors import CheckpointError, ConfigError, import_extra, refusing
from mvit_video.model.base import VideoModel
from mvit_video.model.config import MViTConfig
from mvit_video.model.mvit import MViT
from mvit_video.weights.description import model_metadata, parse_metadata
from mvit_video.weights.reading import EXPORTED, METADATA_KEY

MAX_BATCH = 1024  # clips that a program takes at once

Program = Callable[[Tensor], list[Tensor]]  # all outputs, in order


class ExportedModel(VideoModel):
    """A model from a file of ``export_model``: float clips (B, 3, T, H, W) -> logits (B, num_classes).

    It takes the place of an ``MViT`` in ``Recognizer``. Clips must have the size it was exported for.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], metadata: str | None, path: str) -> None:
        super().__init__()
        if not metadata:
            raise CheckpointError(f"{path}: holds no description of the model; was it made by mvit-export?")
        description = parse_metadata(metadata, path)
        if not isinstance(description.config, MViTConfig):
            raise CheckpointError(f"{path}: describes {description.config.name}, but only MViT is exported")
        self.config, self.protocol = description.config, description.protocol
        self.class_names, self.multi_label = description.class_names, description.multi_label
        self._run, self.path = run, path

    def forward(self, clips: Tensor) -> Tensor:
        """Raises ConfigError for clips of another size, CheckpointError where the program fails."""
        size = (3, *self.config.input_size)
        if tuple(clips.shape[1:]) != size:
            raise ConfigError(
                f"{self.path} was exported for clips of {size}, got {tuple(clips.shape[1:])}; "
                "export it with these views"
            )
        with refusing(CheckpointError, f"{self.path}: its program fails", but=(torch.OutOfMemoryError,)):
            logits = torch.cat([self._run(part) for part in clips.split(MAX_BATCH)])
        if tuple(logits.shape) != (expected := (len(clips), self.config.num_classes)):
            raise CheckpointError(f"{self.path}: gives {tuple(logits.shape)}, its description {expected}")
        return logits


def export_model(model: MViT, path: str | Path, *, compiled: bool = False) -> None:
    """Write a model as ONNX (``.onnx``) or as a program of ``torch.export`` (``.pt2``), for any batch size.

    Args:
        compiled: of a ``.pt2``: machine code for this kind of processor (AOTInductor, needs a C++ compiler).

    Raises:
        ConfigError: another suffix, or a package that this needs is missing.
    """
    path, model = Path(path), model.cpu().eval()
    # Two: a batch of one would be taken for a constant.
    clips = torch.zeros(2, 3, *model.config.input_size)
    shapes = {"clips": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}}
    metadata = model_metadata(model)
    write_program(model, {"clips": clips}, ["logits"], metadata, path, shapes=shapes, compiled=compiled)


def write_program(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    metadata: Mapping[str, Any],
    path: Path,
    *,
    shapes: Any = None,
    compiled: bool = False,
) -> None:
    """Write a model for inputs like these, each by its name; errors as of ``export_model``.

    Args:
        outputs: their names.
        shapes: ``torch.export``'s ``dynamic_shapes``; None: inputs have these sizes.
    """
    require_exported_suffix(path)
    if compiled and path.suffix != ".pt2":
        raise ConfigError(f"{path}: only a .pt2 can be compiled")
    about, samples = {METADATA_KEY: json.dumps(metadata)}, tuple(inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters: about their own insides
        if path.suffix == ".onnx":
            names = {"input_names": list(inputs), "output_names": outputs}
            _write_onnx(model, samples, about, path, dynamic_shapes=shapes, **names)
            return
        program = torch.export.export(model, samples, dynamic_shapes=shapes)
        if compiled:
            settings = {"aot_inductor.metadata": about}
            with refusing(ConfigError, f"{path}: can't be compiled; compiled=true needs a C++ compiler"):
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=settings
                )
            return
        buffer = io.BytesIO()  # PyTorch ends the whole process where it can't write a file
        torch.export.save(program, buffer, extra_files=about)
        path.write_bytes(buffer.getbuffer())


def _write_onnx(
    model: nn.Module, samples: tuple[Tensor, ...], about: dict[str, str], path: Path, **options: Any
) -> None:
    onnx = import_extra("onnx", "onnx", "ONNX")
    import_extra("onnxscript", "onnx", "ONNX")
    for name in ("onnxscript", "onnx_ir"):  # hundreds of lines about their own steps
        logging.getLogger(name).setLevel(logging.WARNING)
    program = torch.onnx.export(model, samples, dynamo=True, verbose=False, **options)
    assert program is not None
    proto = program.model_proto  # a new one each time
    onnx.helper.set_model_props(proto, about)
    onnx.save(proto, str(path))


def require_exported_suffix(path: Path) -> None:
    """Raises ConfigError for a file that no model is exported as."""
    if path.suffix not in EXPORTED:
        raise ConfigError(f"{path}: models are exported as {' or '.join(EXPORTED)}")


def load_exported(path: str | Path, device: str | torch.device = "cpu", trust: bool = False) -> ExportedModel:
    """Read a file of ``export_model``.

    Args:
        trust: a ``.pt2`` is a program, compiled or not, and loading one can run any code: it is refused
            unless you say that you trust where it comes from. ONNX files hold no code of their own.

    Raises:
        CheckpointError: the file can't be read, isn't trusted, or isn't one of this toolkit's.
        ConfigError: onnxruntime isn't installed.
    """
    run, metadata = load_program(path, device, trust)
    return ExportedModel(lambda clips: run(clips)[0], metadata, str(path))


def load_program(
    path: str | Path, device: str | torch.device = "cpu", trust: bool = False
) -> tuple[Program, str | None]:
    """What an exported file computes, and its metadata; as ``load_exported``, with the same errors."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix != ".onnx" and not trust:
        raise CheckpointError(
            f"{path}: refused, as a .pt2 is a program that can run any code when it is loaded; if you "
            "made it or trust who did, set trust=true (in Python load_exported(path, trust=True)), "
            "or export it as ONNX, which holds no code"
        )
    load = _load_onnx if path.suffix == ".onnx" else _load_pt2
    what = f"{path}: damaged, no exported model, or made for another machine or version"
    with refusing(CheckpointError, what, but=(ConfigError,)):
        return load(path, torch.device(device))


def _load_onnx(path: Path, device: torch.device) -> tuple[Program, str | None]:
    runtime = import_extra("onnxruntime", "onnx", "ONNX")
    providers = ["CUDAExecutionProvider"] * (device.type == "cuda")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Weights may lie in other files, which are looked for here: where there are none.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path))
    if missing := set(providers) - set(runtime.get_available_providers()):
        raise ConfigError(f"onnxruntime has no {missing.pop()} here; device=cpu, or install onnxruntime-gpu")
    providers.append("CPUExecutionProvider")
    session = runtime.InferenceSession(path.read_bytes(), options, providers=providers)
    (taken,) = session.get_inputs()

    def run(batch: Tensor) -> list[Tensor]:
        return list(map(torch.from_numpy, session.run(None, {taken.name: batch.float().cpu().numpy()})))

    return run, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)


def _load_pt2(path: Path, device: torch.device) -> tuple[Program, str | None]:
    with zipfile.ZipFile(path) as archive:
        is_compiled = any("aotinductor" in name for name in archive.namelist())
    if is_compiled:
        module: Any = torch._inductor.aoti_load_package(str(path))
        metadata = module.get_metadata().get(METADATA_KEY)
    else:
        extra = {METADATA_KEY: ""}
        program = torch.export.load(path, extra_files=extra)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module, metadata = program.module(), extra[METADATA_KEY]

    def run(batch: Tensor) -> list[Tensor]:
        found = module(batch)
        return [found] if isinstance(found, Tensor) else list(found)

    return run, metadata
