"""Names of classes in label order: shipped ones, files of them, and how names in the wild are matched."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mvit_video.data.files import existing, is_text, lines_of, parse_json, quoted
from mvit_video.errors import DataError, did_you_mean

ClassNames = Sequence[str] | str | Path

_NUMBERED = re.compile(r'(\d{1,6})\s*[,;:\t]\s*"?(.*[^"])"?')  # `3,name`
_SHIPPED = Path(__file__).parent / "classes"


def read_class_names(source: ClassNames) -> tuple[str, ...]:
    """The names in label order.

    Args:
        source: the names, or a shipped list ("kinetics400", "kinetics600", "kinetics700", "ssv2"), or a file:
            text with one name a line, or ``index,name``, a JSON list, or JSON ``{name: index}``.

    Raises:
        DataError: the file is missing or has another form, a name comes twice, or it isn't text.
    """
    if isinstance(source, list | tuple):
        where, names = "class_names", [str(name) for name in source]
    else:
        shipped = {file.stem: file for file in _SHIPPED.glob("*.txt")}
        file = shipped.get(str(source)) or existing(str(source))
        where = str(file)
        names = _names_in_json(file) if file.suffix.lower() == ".json" else _names_in_text(file)
    check_class_names(names, where)
    return tuple(names)


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raises `DataError`, beginning with `where`, for no names, and for one that is blank or comes twice."""
    if not names:
        raise DataError(f"{where}: no class names")
    for name, count in Counter(names).items():
        if not name.strip() or not is_text(name):
            raise DataError(f"{where}: {quoted(name)} is no class name")
        if count > 1:
            raise DataError(f"{where}: class name {quoted(name)} comes twice")


def check_same_classes(
    known: Sequence[str] | None, num_classes: int, class_names: Sequence[str], hint: str = ""
) -> None:
    """DataError where a data set's classes aren't those of a model, in the same order.

    Args:
        known: the names of the model's classes, where it has them.
        num_classes: how many the model has.
        hint: what to do about it.
    """
    if num_classes != len(class_names):
        raise DataError(f"the checkpoint has {num_classes} classes, the data set {len(class_names)}{hint}")
    for index, (one, other) in enumerate(zip(known or class_names, class_names, strict=True)):
        if one != other:
            raise DataError(
                f"class {index} is {quoted(one)} in the checkpoint and {quoted(other)} in the data set; "
                f"both must have the same classes in the same order{hint}"
            )


class LabelOf:
    """The label of a class name, however it is spelt: case, underscores, quotes and brackets don't count.

    Lists and folders of the same data set write ``playing_badminton``, ``"playing badminton"`` or
    ``Putting [something] into [something]``; disks compose accents in two ways.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._labels = {name: label for label, name in enumerate(names)}
        # Two names that differ by case alone are told apart only as they are.
        spellings = Counter(map(_fold, names))
        self._folded = {_fold(name): i for i, name in enumerate(names) if spellings[_fold(name)] == 1}

    def __call__(self, name: str, where: str) -> int:
        """Raises `DataError`, beginning with `where`, for a name that isn't known."""
        label = self._labels[name] if name in self._labels else self._folded.get(_fold(name))
        if label is None:
            nearest = did_you_mean(name[:200], self._names)
            more = f", ... ({len(self._names)} in all)" if len(self._names) > 5 else ""
            known = f"the classes are {', '.join(self._names[:5])}{more}"
            raise DataError(f"{where}: unknown class {quoted(name)}{nearest}; {known}")
        return label


def _fold(name: str) -> str:
    name = unicodedata.normalize("NFC", re.sub(r'[_"\[\]]', " ", name)).casefold()
    return " ".join(name.split())


def _names_in_text(file: Path) -> list[str]:
    lines = [line for _, line in lines_of(file)]
    for rows in (lines, lines[1:]):  # the first may be a header
        found = [match.groups() for line in rows if (match := _NUMBERED.fullmatch(line))]
        numbers = [int(number) for number, _ in found]
        if found and numbers == list(range(numbers[0], numbers[0] + len(rows))):
            if numbers[0] != 0:
                raise DataError(f"{file}: its names are numbered from {numbers[0]}; labels start at 0")
            return [name for _, name in found]
    return lines


def _names_in_json(file: Path) -> list[str]:
    content = parse_json(file)
    if isinstance(content, dict):
        # PySlowFast's Kinetics file has quotes inside its names, Something-Something's around its numbers.
        name_of = {str(label): name.strip('"') for name, label in content.items()}
        content = [name_of.get(str(label)) for label in range(len(content))]
        if None in content:
            raise DataError(f"{file}: expected each index from 0 to {len(content) - 1} once")
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{file}: expected a list of class names, or {{name: index}}")
    return content
