"""The classes of a model as those of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor

from mvit_video.data.class_names import check_same_classes
from mvit_video.data.files import existing, parse_json, read_text
from mvit_video.errors import ConfigError, DataError, brief, did_you_mean
from mvit_video.model import VideoModel

ClassMap = dict[str, list[str]]


def read_class_map(source: str | None) -> ClassMap | None:
    """``{class of the data set: classes of the model}`` of a JSON or YAML file; {} for "names".

    Raises:
        DataError: the file can't be read or has another form, or a class is in it twice.
    """
    if source is None or source == "names":
        return None if source is None else {}
    where, file = f"class_map={source}", existing(source)
    if file.suffix.lower() == ".json":
        content = parse_json(file)
    else:
        try:
            content = yaml.load(read_text(file), Loader=_YamlOfText)
        except (yaml.YAMLError, RecursionError) as error:
            raise DataError(f"{where}: {brief(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected {{class of the data set: class or classes of the model}}")
    found: ClassMap = {}
    for name, value in content.items():
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(one, str | int | float) for one in names):
            possible = "expected a class of the model, or a list of them"
            raise DataError(f"{where}: {name!r} has {value!r:.100}; {possible}")
        found[str(name)] = names = [str(one) for one in names]
        if (twice := _first_twice(names)) is not None:
            raise DataError(f"{where}: {name!r} has the class {twice!r} twice")
    return found


def class_matrix(
    known: Sequence[str], wanted: Sequence[str], mapping: Mapping[str, Sequence[str]] | None = None
) -> Tensor:
    """float (known, wanted): which of a model's classes count for each class of a data set.

    Args:
        mapping: for a wanted class, the names of the model's; classes that it leaves out are looked up by
            their own name.

    Raises:
        DataError: a wanted class has no counterpart, a name is unknown, or one counts for two classes.
    """
    mapping = mapping or {}
    if (twice := _first_twice(known)) is not None:
        raise DataError(
            f"two classes of the model are called {twice!r}; class_names=FILE can tell them apart"
        )
    position = {name: index for index, name in enumerate(known)}
    matrix = torch.zeros(len(known), len(wanted))
    for name in mapping:
        if name not in wanted:
            raise DataError(f"class_map has {name!r}, which the data set lacks{did_you_mean(name, wanted)}")
    for column, name in enumerate(wanted):
        for source in mapping.get(name, [name]):
            if source not in position:
                raise DataError(
                    f"class {name!r}: the model has no class {source!r}{did_you_mean(source, known)}; "
                    "class_map=FILE can say which one it is"
                )
            row = matrix[position[source]]
            if row.any():
                other = wanted[int(row.argmax())]
                raise DataError(f"class {source!r} of the model counts for both {other!r} and {name!r}")
            row[column] = 1
    return matrix


def matching_classes(
    known: Sequence[str] | None, num_classes: int, wanted: Sequence[str], mapping: ClassMap | None
) -> Tensor | None:
    """How a model's classes become a data set's (``class_matrix``); None where they are the same.

    Args:
        known: the names of the model's classes, where it has them.
        num_classes: how many it has.
        mapping: as ``read_class_map`` gives it; None: the classes must be the same.

    Raises:
        DataError: they don't match. ConfigError: a mapping, and nothing is known of the model's classes.
    """
    if known and len(known) != num_classes:
        raise DataError(f"class_names has {len(known)} names, the model has {num_classes} classes")
    if mapping is None:
        check_same_classes(known, num_classes, wanted, "; class_map=names evaluates those that match by name")
        return None
    if known is None:
        raise ConfigError("class_map needs the names of the model's classes: give class_names=...")
    return class_matrix(known, wanted, mapping)


def map_classes(scores: Tensor, matrix: Tensor) -> Tensor:
    """Scores (..., known) -> (..., wanted): summed per class, scaled to sum to 1 over the wanted ones."""
    mapped = scores @ matrix
    return mapped / mapped.sum(-1, keepdim=True).clamp(min=torch.finfo(mapped.dtype).tiny)


def require_same_kind(model: VideoModel, multi_label: bool, *, class_map: bool) -> None:
    """Raise ConfigError where a model is of several classes a video and the data of one, or vice versa."""
    if model.multi_label and not multi_label:
        raise ConfigError(
            "the model is of several classes a video, the data set of one; its lists may say several: "
            "data=csv or json with data.multi_label=true"
        )
    if multi_label and not model.multi_label:
        raise ConfigError("the data set is of several classes a video (data.multi_label), the model of one")
    if multi_label and class_map:
        raise ConfigError("class_map is for models of one class a video")


def _first_twice(names: Sequence[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


class _YamlOfText(yaml.BaseLoader):
    """Reads every scalar as text, so that a class may be called yes or 12."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = [[self.construct_object(part, deep=True) for part in pair] for pair in node.value]
        if (twice := _first_twice([str(name) for name, _ in pairs])) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} comes twice", node.start_mark)
        return {str(name): value for name, value in pairs}
