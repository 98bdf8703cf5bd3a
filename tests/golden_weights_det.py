"""Deterministic weights, images and targets for cross-checking MViTv2 detectors (official detectron2 names).

    weights([(name, shape), ...]) -> {name: array}   parameters AND buffers by official name
    image_u8(h, w, tag) -> uint8 RGB [3, H, W];  feature_input(h, w, tag) -> normalised float32 [1, 3, H, W]
    targets(h, w) -> boxes (xyxy floats), classes, polygons for the training-loss goldens

Backbone tensors ("backbone.bottom_up.*") follow golden_weights.centre_and_gain; the rest has its own gains,
chosen so that proposals move, scores are neither flat nor saturated and masks have both signs.
"""

import math

import numpy as np
from golden_weights import centre_and_gain as classification_gain
from golden_weights import image as feature_input
from golden_weights import unit


def centre_and_gain(name, shape):
    """(c, g): the tensor is c + g * unit.  A uniform of std s has g = s * sqrt(3)."""
    if name.startswith("backbone.bottom_up."):
        return classification_gain(name, shape)
    leaf = name.split(".")[-1]
    if leaf == "running_mean":
        return 0.0, 0.20
    if leaf == "running_var":
        return 1.0, 0.30
    if ".norm." in name:  # BatchNorm of the box and mask heads
        return (1.0, 0.20) if leaf == "weight" else (0.0, 0.20)
    if leaf == "bias":
        if ".anchor_deltas." in name:  # larger boxes, which reach the upper levels of the pyramid
            return 0.5, 0.2
        gain = {"objectness_logits": 0.5, "cls_score": 0.5, "bbox_pred": 0.2}
        return 0.0, gain.get(name.split(".")[-2], 0.1)
    # fan-in; of a transposed convolution (in, out, kh, kw) with stride = kernel it is `in`
    fan_in = shape[0] if ".deconv." in name else int(np.prod(shape[1:]))
    layer = name.split(".")[-2]
    # p2 sums four levels and has most anchors: without these gains no other level would ever win
    pyramid = {"fpn_output2": 0.4, "fpn_output3": 0.9, "fpn_output4": 2.0, "fpn_output5": 3.2}
    factor = {
        "objectness_logits": 1.5,
        "anchor_deltas": 0.35,
        "cls_score": 1.5,
        "bbox_pred": 0.6,
        "predictor": 2.0,
    }
    if layer == "cls_score" and name.split(".")[-3].isdigit():  # a cascade averages three heads
        factor["cls_score"] = 4.5
    std = factor.get(layer, pyramid.get(layer, 1.0 if "backbone.fpn_" in name else math.sqrt(2))) / math.sqrt(
        fan_in
    )
    return 0.0, std * math.sqrt(3.0)


def weights(params):
    out = {}
    for name, shape in params:
        shape = tuple(int(s) for s in shape)
        if name.endswith("num_batches_tracked"):
            out[name] = np.zeros((), np.int64)
            continue
        c, g = centre_and_gain(name, shape)
        u = unit(name, int(np.prod(shape)))
        if name.startswith("roi_heads.") and len(shape) > 1 and ".deconv." not in name:
            # Inputs of these layers went through a ReLU: opposite weights for the two halves take their
            # common mean away, without which every region would look alike.
            u = u.reshape(shape[0], -1)
            half = u.shape[1] // 2
            u[:, half:] = -u[:, :half]
        out[name] = (np.float32(c) + np.float32(g) * u).reshape(shape)
    return out


def image_u8(h, w, tag="image"):
    """uint8 RGB [3, H, W]: the blocky pattern of golden_weights.image with mean 120 and std 55."""
    x = feature_input(h, w, tag)[0].astype(np.float64)
    return np.clip(np.rint(120.0 + 55.0 * x), 0, 255).astype(np.uint8)


def targets(h, w):
    """Four objects: three polygons (one of them in two parts) and a box; all sizes, some overlap.

    Returns boxes [4, 4] float32 xyxy (tight around the polygons), classes [4] int64, polygons: list (objects)
    of lists (parts) of flat float64 [x0, y0, x1, y1, ...].
    """

    def scaled(points):
        return np.array([c * (w if k % 2 == 0 else h) for k, c in enumerate(points)], dtype=np.float64)

    polygons = [
        [scaled([0.08, 0.10, 0.42, 0.16, 0.47, 0.55, 0.12, 0.60])],
        [
            scaled([0.50, 0.30, 0.62, 0.30, 0.56, 0.48]),
            scaled([0.64, 0.40, 0.72, 0.42, 0.70, 0.52, 0.62, 0.50]),
        ],
        [scaled([0.30, 0.45, 0.95, 0.50, 0.92, 0.97, 0.33, 0.90])],
        [scaled([0.80, 0.06, 0.90, 0.06, 0.90, 0.20, 0.80, 0.20])],
    ]
    boxes = []
    for parts in polygons:
        xy = np.concatenate(parts)
        boxes.append([xy[0::2].min(), xy[1::2].min(), xy[0::2].max(), xy[1::2].max()])
    return np.array(boxes, np.float32), np.array([0, 17, 56, 79], np.int64), polygons
