"""Weights into detectors: our own, detectron2's, and a classifier's into the backbone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mvit_video.errors import CheckpointError, brief
from mvit_video.model import MViTConfig
from mvit_video.weights.checkpoint import LoadReport, fit_weights, require_head
from mvit_video.weights.description import describing, plain_metadata
from mvit_video.weights.formats import adapt_shape, to_pyslowfast_keys
from mvit_video.weights.pickles import load_arrays
from mvit_video.weights.reading import METADATA_KEY, find_weights, read_checkpoint

BACKBONE = "backbone.bottom_up."
# What depends on the classes.
_HEAD = re.compile(
    r"^roi_heads\.(box_predictor\.\d\.(cls_score|bbox_pred)|mask_predictor\.mask_fcn_logits)\."
)
# Constants that detectron2 has written among the weights at times, and a classifier's own end.
_NO_WEIGHTS = re.compile(r"^(pixel_(mean|std)$|proposal_generator\.anchor_generator\.)")
_CLASSIFIER_ONLY = re.compile(r"^(norm\.|head\.|cls_token$)")
_NORM_OF_SCALE = re.compile(r"\.scale\d_norm\.")
Rule = tuple[str, str | Callable[[re.Match[str]], str]]
_RULES: tuple[Rule, ...] = (
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"proposal_generator.head.conv.\1.0."),
    (r"^proposal_generator\.rpn_head\.conv\.", "proposal_generator.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "proposal_generator.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "proposal_generator.head.bbox_pred."),
    (
        r"^(roi_heads\.(?:box_head\.\d|mask_head))\.(?:conv|mask_fcn)(\d)\.(norm\.)?",
        lambda m: f"{m[1]}.{int(m[2]) - 1}.{int(m[3] is not None)}.",
    ),
    (r"^roi_heads\.box_head\.(\d)\.fc1\.", r"roi_heads.box_head.\1.5."),
    (r"^roi_heads\.box_head\.fc(\d)\.", lambda m: f"roi_heads.box_head.0.fc{int(m[1]) + 5}."),
    (r"^roi_heads\.box_predictor\.(?=[a-z])", "roi_heads.box_predictor.0."),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)


def load_detector_weights(
    detector: nn.Module, source: str | Path | Mapping[str, Any], *, head: Literal["strict", "new"] = "strict"
) -> LoadReport:
    """Load weights into a detector; the format is found out from the file.

    A classifier's weights go into the backbone, and all else stays as initialised. Every other difference in
    names or shapes is an error, but for tables of relative positions, which are interpolated.

    Args:
        source: a file of detectron2 (``.pkl``, ``.pyth``), of a classifier or of this toolkit, or what is in
            one.
        head: "new" keeps what depends on the classes, as for other classes.

    Raises:
        CheckpointError: the file can't be read, or names or shapes differ.
        ConfigError: there is no such ``head``.
    """
    require_head(head)
    name = "state dict" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping):
        source = _read_arrays(Path(source)) if name.endswith(".pkl") else read_checkpoint(source)
    weights = find_weights(source, name)[0]
    weights = {from_detectron2(key): value for key, value in weights.items() if not _NO_WEIGHTS.match(key)}
    expected = detector.state_dict()
    fresh = [key for key in expected if head == "new" and _HEAD.match(key)]
    if not any(key.startswith(BACKBONE) for key in weights):
        weights = {
            BACKBONE + key: value
            for key, value in to_pyslowfast_keys(weights, name).items()
            if not _CLASSIFIER_ONLY.match(key)
        }
        fresh = [key for key in expected if not key.startswith(BACKBONE) or _NORM_OF_SCALE.search(key)]
    weights = {key: value for key, value in weights.items() if key not in fresh}
    hint = partial(_other_model, detector, source)
    fitted, report = fit_weights(expected, weights, name, kept=fresh, adapt=_adapt, hint=hint)
    detector.load_state_dict(fitted, strict=False)
    return report


def _other_model(detector: Any, content: Mapping[str, Any]) -> str:
    """The end of an error: which other detector a checkpoint of this toolkit describes, or what may help."""
    from mvit_video.detection.checkpoint import TASK
    from mvit_video.detection.detector import DetectorConfig
    from mvit_video.detection.variants import DETECTORS

    def layout(config: Any) -> tuple[Any, ...]:
        own = config.cascade, config.fpn, config.channels, config.box_channels
        return *own, config.backbone.stages, config.backbone.embed_dim

    with contextlib.suppress(CheckpointError), describing("the file"):
        values = dict(plain_metadata(content[METADATA_KEY], "the file", TASK)["config"])
        found = layout(DetectorConfig(MViTConfig(**values.pop("backbone")), **values))
        if found != layout(detector.config):
            names = [f"model={name}" for name, config in DETECTORS.items() if layout(config) == found]
            return f"; the file is of {names[0] if names else f'another model, of {found[4]} blocks'}"
    return (
        "; other classes need head=new, a backbone that widens in its MLPs (published L) needs "
        "dim_mul_in_attention=False"
    )


def _adapt(key: str, value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    adapted = adapt_shape(key.removeprefix(BACKBONE), value, shape, (1, 1, 1))
    return None if adapted and adapted[1] == "inflated" else adapted


def from_detectron2(name: str) -> str:
    """Our name of a tensor that detectron2 calls ``name``; other names stay."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _read_arrays(path: Path) -> dict[str, Any]:
    """detectron2's model zoo: a pickled dictionary whose "model" holds arrays by name."""
    try:
        arrays = load_arrays(path, encoding="latin1")["model"]
        numbers = {key: value for key, value in arrays.items() if isinstance(value, np.ndarray)}
        if len(numbers) < len(arrays) or any(value.dtype.kind not in "fiu" for value in numbers.values()):
            raise ValueError("more than arrays of numbers")
        return {key: torch.from_numpy(np.array(value)) for key, value in numbers.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise CheckpointError(f"{path}: refused, no file of plain arrays ({brief(error)})") from None
