"""Tables of scores: combined as the official code does, kept on disk, put together, read from other tools."""

from __future__ import annotations

import json
import math
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, error_line
from golden_weights import unit
from synthetic_scores import score_table

from mvit_video.errors import DataError
from mvit_video.evaluation.classes import class_matrix, map_classes, read_class_map
from mvit_video.evaluation.importers import read_foreign_scores
from mvit_video.evaluation.metrics import measure
from mvit_video.evaluation.score_files import read_scores, write_scores
from mvit_video.evaluation.scores import (
    Combination,
    aligned,
    combine,
    ensemble,
    with_labels,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "reference" / "protocol.json").read_text())["ensemble"][0]


@pytest.mark.parametrize(("how", "name"), [("mean", "sum"), ("max", "max")])
def test_views_combine_as_in_slowfast(how: str, name: str) -> None:
    videos, views, classes = GOLDEN["videos"], GOLDEN["views"], GOLDEN["classes"]
    logits = 6 * torch.from_numpy(unit("e0", videos * views * classes)).view(videos, views, classes)
    table = score_table(logits.softmax(-1), GOLDEN["labels"])
    scores = combine(table.views, how)
    golden = torch.tensor(GOLDEN[name]["video0_scores"])
    torch.testing.assert_close(scores[0], golden / golden.sum())
    assert scores.topk(5).indices.tolist() == GOLDEN[name]["top5_indices"]
    accuracy = measure(table, how).accuracy
    assert accuracy["video_top1"] == GOLDEN[name]["top1_correct"] / videos
    assert accuracy["video_top5"] == GOLDEN[name]["top5_correct"] / videos


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_logits_are_averaged_before_the_softmax(scale: float) -> None:
    logits = torch.randn(20, 4, 9, generator=torch.Generator().manual_seed(0)) * scale
    expected = logits.mean(1).softmax(-1)
    torch.testing.assert_close(combine(logits.softmax(-1), "logits"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", get_args(Combination))
def test_combined_scores_are_probabilities(how: str) -> None:
    views = torch.rand(5, 3, 6).softmax(-1)
    torch.testing.assert_close(combine(views, how).sum(-1), torch.ones(5))


# Files


def test_a_file_gives_its_table_back(tmp_path: Path) -> None:
    table = replace(
        score_table(torch.rand(7, 3, 5).softmax(-1), [0, 1, 2, 3, 4, 0, 1]), provenance={"a": [1, None]}
    )
    write_scores(table, tmp_path / "scores.parquet")
    found = read_scores(tmp_path / "scores.parquet")
    assert found.videos == table.videos
    assert found.class_names == table.class_names
    assert found.provenance == table.provenance
    assert torch.equal(found.views, table.views)
    assert torch.equal(found.spans, table.spans)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    table = score_table(torch.rand(7, 3, 5).softmax(-1), [0] * 7)
    write_scores(table, tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(rows.take(np.random.default_rng(0).permutation(21)), tmp_path / "b.parquet")
    shuffled = with_labels(read_scores(tmp_path / "b.parquet"), table.videos, table.class_names)
    assert torch.equal(shuffled.views, table.views)


def changed(path: Path, column: str, row: int, value: object) -> None:
    """Give one cell of a file of scores another value, and its column the type that holds it."""
    rows = pq.read_table(path)
    values = rows[column].to_pylist()
    values[row] = value
    if isinstance(value, str):
        values = [None if one is None else str(one) for one in values]
    position = rows.column_names.index(column)
    pq.write_table(rows.set_column(position, column, pa.array(values)), path)


@pytest.mark.parametrize(
    ("column", "row", "value", "named"),
    [
        ("label", 4, 99, ["label", "row 4", "99"]),
        ("label", 4, -1, ["label", "row 4", "-1"]),
        ("label", 0, 2, ["label", "row 1", "0", "another"]),
        ("label", 4, 0.5, ["label", "0.5"]),
        ("label", 4, "cat", ["label"]),
        ("path", 1, "/elsewhere.mp4", ["path", "row 1", "/elsewhere.mp4", "another"]),
        ("id", 3, None, ["id", "row 3", "missing"]),
        ("path", 3, None, ["path", "row 3", "missing"]),
        ("view", 3, None, ["view", "row 3", "missing"]),
        ("view", 3, 2, ["v1", "view"]),
        ("view", 3, -1, ["v1", "view"]),
        ("view", 3, 2**31 - 1, ["v1", "view"]),
        ("view", 3, 2**40, ["view"]),
        ("id", 3, "v0", ["view"]),
        ("scores", 3, None, ["scores", "row 3", "missing"]),
        ("scores", 3, [0.2, 0.8], ["scores"]),
        ("scores", 3, [0.2, None, 0.1], ["scores", "row 3", "nan"]),
        ("scores", 3, [0.2, math.nan, 0.1], ["scores", "row 3", "nan"]),
        ("scores", 3, [0.2, math.inf, 0.1], ["scores", "row 3", "inf"]),
        ("scores", 3, [0.2, 1e30, 0.1], ["scores", "row 3", "e+30"]),
        ("scores", 3, [0.0, 0.0, 0.0], ["scores", "row 3"]),
        ("start", 3, math.inf, ["start", "row 3", "inf"]),
        ("end", 3, -math.inf, ["end", "row 3", "inf"]),
        ("end", 3, -1.0, ["start", "row 3"]),
        ("scores", 3, [0.2, -0.5, 0.1], ["scores", "row 3", "-0.5"]),
        ("start", 3, "soon", ["start"]),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_named(
    tmp_path: Path, column: str, row: int, value: object, named: list[str]
) -> None:
    file = tmp_path / "a.parquet"
    write_scores(score_table(torch.rand(2, 3, 3).softmax(-1), [0, 1]), file)
    changed(file, column, row, value)
    with pytest.raises(DataError) as caught:
        read_scores(file)
    assert all(word in str(caught.value) for word in ["a.parquet", *named]), caught.value


@pytest.mark.parametrize(
    "metadata",
    [
        b"{",
        b"\xff",
        b"[]",
        b'{"class_names": ["a"]}',
        b'{"class_names": ["a", "a", "b"]}',
        b'{"class_names": 3}',
        b'{"class_names": ["a", "b", "\\ud800"]}',
        b'{"facts": {"versions": {"x": Infinity}}}',
        b'{"class_names": "abc"}',
        b'{"class_names": [1, 2, 3]}',
        b'{"facts": 3}',
        b'{"facts": {"bad_videos": [3]}}',
        b'{"facts": {"bad_videos": [{"id": 3}]}}',
        b'{"facts": {"versions": "new"}}',
        b'{"facts": {"protocol_text": 1}}',
        b"[" * 100_000,
    ],
    ids=lambda content: content.decode("latin-1")[:40],
)
def test_damaged_metadata_is_refused(tmp_path: Path, metadata: bytes) -> None:
    write_scores(score_table(torch.rand(2, 3, 3).softmax(-1), [0, 1]), tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({"mvit_video": metadata})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: "):
        read_scores(tmp_path / "a.parquet")


def test_files_that_other_programs_rewrite_are_read(tmp_path: Path) -> None:
    table = score_table(torch.rand(2, 3, 5).softmax(-1), [0, 1])
    write_scores(table, tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()  # lists of float64, no metadata
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    found = read_scores(tmp_path / "b.parquet")
    assert torch.equal(found.views, table.views)
    assert found.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5, 5], []], ids=str)
def test_rows_that_are_missing_or_twice_are_refused(tmp_path: Path, rows: list[int]) -> None:
    write_scores(score_table(torch.rand(2, 3, 5).softmax(-1), [0, 1]), tmp_path / "a.parquet")
    pq.write_table(
        pq.read_table(tmp_path / "a.parquet").take(pa.array(rows, pa.int64())), tmp_path / "b.parquet"
    )
    with pytest.raises(DataError, match=r"b\.parquet: (v\d lacks|no scores)"):
        read_scores(tmp_path / "b.parquet")


@pytest.mark.parametrize("column", ["id", "label"])
def test_a_small_file_takes_no_large_memory(tmp_path: Path, column: str) -> None:
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 100), ["x" * 10**6])
    pq.write_table(
        pa.table({column: long if column == "id" else pa.array(np.zeros(10**7))}), tmp_path / "a.parquet"
    )
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    with pytest.raises(DataError, match=r"a\.parquet: .*than the file can hold"):
        read_scores(tmp_path / "a.parquet")


def test_views_of_two_videos_do_not_make_one(tmp_path: Path) -> None:
    write_scores(score_table(torch.rand(2, 2, 5).softmax(-1), [0, 0]), tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").take([0, 3]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="v1 lacks a view"):
        read_scores(tmp_path / "b.parquet")


def test_views_of_a_video_with_several_classes_have_the_same(tmp_path: Path) -> None:
    table = score_table(torch.rand(2, 2, 3), [0, 0])
    several = replace(table, videos=tuple(replace(video, label=(0, 2)) for video in table.videos))
    write_scores(several, tmp_path / "a.parquet")
    assert read_scores(tmp_path / "a.parquet").videos == several.videos
    changed(tmp_path / "a.parquet", "labels", 3, [0, 1])
    with pytest.raises(DataError, match=r"label of row 3 is \(0, 1\); other views"):
        read_scores(tmp_path / "a.parquet")


def test_other_files_are_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    assert "a.parquet: no Parquet file" in error_line(command("eval", "scores=a.parquet"), "eval")
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: .* path"):
        read_scores(tmp_path / "b.parquet")


# Labels, classes, several tables


def test_labels_and_predictions_must_meet() -> None:
    table = score_table(torch.rand(3, 1, 2).softmax(-1), [0, 1, 0])
    names = table.class_names
    with pytest.raises(DataError, match="v2: in the data set but not scored"):
        with_labels(score_table(table.views[:2], [0, 1]), table.videos, names)
    with pytest.raises(DataError, match="v2: scored but not in the data set"):
        with_labels(table, table.videos[:2], names)
    excused = replace(score_table(table.views[:2], [0, 1]), provenance={"bad_videos": [{"id": "v2"}]})
    assert len(with_labels(excused, table.videos, names)) == 2
    unlabelled = replace(table, videos=(*table.videos[:2], replace(table.videos[2], label=None)))
    with pytest.raises(DataError, match="v2 has scores but no label"):
        measure(unlabelled)


def test_classes_map_by_name() -> None:
    known, scores = ["run", "jump", "swim"], torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    mapped = map_classes(scores, class_matrix(known, ["jump", "run"]))
    torch.testing.assert_close(mapped, torch.tensor([[0.375, 0.625], [0, 0]]))
    mapping = {"sport": ["run", "jump"], "water": ["swim"]}
    mapped = map_classes(scores, class_matrix(known, ["water", "sport"], mapping))
    torch.testing.assert_close(mapped, torch.tensor([[0.2, 0.8], [1, 0]]))


@pytest.mark.parametrize(
    ("wanted", "mapping", "message"),
    [
        (["jmup"], {}, r"no class 'jmup' \(did you mean 'jump'\?\)"),
        (["a", "b"], {"a": ["run"], "b": ["run"]}, "'run' of the model counts for both 'a' and 'b'"),
        (["run"], {"rnu": ["run"]}, r"'rnu', which the data set lacks \(did you mean 'run'\?\)"),
    ],
)
def test_classes_without_counterpart_are_named(wanted: list[str], mapping: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_matrix(["run", "jump"], wanted, mapping)


def test_a_name_of_two_classes_is_no_counterpart() -> None:
    with pytest.raises(DataError, match=r"'run'.*class_names"):
        class_matrix(["run", "jump", "run"], ["run"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("map.yaml", b"cats: [cats, fish]\nyes: 12\n", {"cats": ["cats", "fish"], "yes": ["12"]}),
        ("map.json", b'{\n\t"cats":\t["fish"],\n\t"d\\u00f6g": "dog"\n}', {"cats": ["fish"], "dög": ["dog"]}),
        ("map.yaml", b"\xef\xbb\xbfcats: fish", {"cats": ["fish"]}),
    ],
    ids=["yaml", "json with tabs", "byte order mark"],
)
def test_class_maps_are_read(tmp_path: Path, name: str, content: bytes, expected: dict) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_class_map(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("cäts: [fish]".encode("latin-1"), "line 1"),
        (b"cats: []", "'cats'"),
        (b'{"cats": []}', "'cats'"),
        (b"cats: [fish, fish]", "'fish' twice"),
        (b"cats: fish\ncats: dogs", "'cats' comes twice"),
        (b'{"cats": "fish", "cats": "dogs"}', "'cats' comes twice"),
        (b"cats: {a: b}", "'cats'"),
        (b'{"cats": null}', "'cats'"),
        (b"[cats]", "expected"),
        (b"", "expected"),
        (b"cats: !!python/object/apply:os.system [ls]\n  x", "line 1"),
        (b"[" * 100_000, "recursion"),
    ],
    ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_class_maps_that_cannot_be_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / ("map.json" if content.startswith(b"{") else "map.yaml")
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"map\.(yaml|json).*({named})"):
        class_matrix(["fish", "dogs"], ["cats"], read_class_map(str(file)))


def test_tables_are_aligned_and_put_together() -> None:
    a = score_table(torch.rand(4, 2, 3).softmax(-1), [0, 1, 2, 0])
    order = [2, 0, 3, 1]
    b = replace(
        a,
        videos=tuple(replace(a.videos[i], label=2 - a.videos[i].label) for i in order),
        views=a.views[order].flip(-1),
        class_names=a.class_names[::-1],
    )
    tables = aligned({"a": a, "b": b})
    assert tables["b"].videos == a.videos
    assert torch.equal(tables["b"].views, a.views)
    torch.testing.assert_close(combine(ensemble(tables, "mean").views, "mean"), a.views.mean(1))
    with pytest.raises(DataError, match="v3: in a but not in b"):
        aligned({"a": a, "b": score_table(a.views[:3], [0, 1, 2])})
    with pytest.raises(DataError, match="v0: in b but not in a"):
        aligned({"a": replace(a, videos=a.videos[1:], views=a.views[1:], spans=a.spans[1:]), "b": a})
    with pytest.raises(DataError, match="v1 is 'class 0' in b and 'class 1' in a"):
        aligned({"a": a, "b": score_table(a.views, [0, 0, 2, 0])})
    with pytest.raises(DataError, match="different classes, such as 'class 0'"):
        aligned({"a": a, "b": replace(a, class_names=("x", "y", "z"))})


# Other tools

SCORES = torch.tensor([[3.0, 1.0, 1.0], [0.5, 4.0, 0.5]])
LABELS = [0, 2]
SHARED_ROW = [0.5] * 10_000  # a pickle holds it once


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_slowfast_pickles(tmp_path: Path, kind: str, protocol: int) -> None:
    content = [SCORES, torch.tensor(LABELS)]
    content = content if kind == "torch" else [part.numpy() for part in content]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    table = read_foreign_scores(tmp_path / "a.pkl")
    torch.testing.assert_close(table.views[:, 0], SCORES / 5)
    assert table.labels.tolist() == LABELS
    assert [video.id for video in table.videos] == ["0", "1"]


def mmaction_rows(kind: str) -> list[dict]:
    if kind == "1.0":
        return [
            {"pred_scores": {"item": row}, "gt_labels": {"item": torch.tensor([label])}}
            for row, label in zip(SCORES / 5, LABELS, strict=True)
        ]
    return [
        {
            "pred_score": row,
            "pred_label": row.argmax()[None],
            "gt_label": torch.tensor([label]),
            "num_crops": 3,
        }
        for row, label in zip(SCORES / 5, LABELS, strict=True)
    ]


@pytest.mark.parametrize("kind", ["1.0", "1.2"])
def test_mmaction_pickles(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(mmaction_rows(kind)))
    table = read_foreign_scores(tmp_path / "a.pkl")
    torch.testing.assert_close(table.views[:, 0], SCORES / 5)
    assert table.labels.tolist() == LABELS


def test_large_scores_do_not_overflow(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([SCORES * 8e37, torch.tensor(LABELS)]))
    torch.testing.assert_close(read_foreign_scores(tmp_path / "a.pkl").views[:, 0], SCORES / 5)


@pytest.mark.parametrize("labels", [True, False])
def test_mmaction_json(tmp_path: Path, labels: bool) -> None:
    rows = [
        {"pred_score": row, "gt_label": [label]}
        for row, label in zip((SCORES - 2).tolist(), LABELS, strict=True)
    ]
    content = rows if labels else [row["pred_score"] for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(content))
    table = read_foreign_scores(tmp_path / "a.json")
    torch.testing.assert_close(table.views[:, 0], (SCORES - 2).softmax(1))  # negative: logits
    assert [video.label for video in table.videos] == (LABELS if labels else [None, None])


class Malicious:
    def __reduce__(self):
        return print, ("run",)


class Storage:
    """Pickled as torch pickles storages, with a pickle of its own inside."""

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Malicious(), 2),)


class Address:
    """What of a file's bytes NumPy would take for the place of an object in memory."""

    def __reduce__(self):
        return np.ndarray, ((1,), "O", b"anywhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Malicious()], r"a\.pkl: asks for builtins\.print; only numpy arrays"),
        ([OrderedDict(a=Path("x"))], r"asks for pathlib\.(_local\.)?PosixPath"),
        ([Storage()], "no readable pickle"),
        ({"a": 1}, "neither PySlowFast's"),
        ([], "neither PySlowFast's"),
        ([SCORES, torch.tensor([0, 1, 2])], "2 rows of scores, labels of shape"),
        ([SCORES, torch.tensor([0, 3])], "row 1 has the label 3"),
        ([SCORES, torch.tensor([0, -1])], "row 1 has the label -1"),
        ([SCORES, torch.tensor([0, 0.5])], "row 1 has the label 0.5"),
        ([SCORES, torch.tensor([0, torch.nan])], "row 1 has the label nan"),
        ([SCORES, np.array(["a", "b"])], "numbers"),
        ([SCORES > 1, torch.tensor([0, 1])], "numbers"),
        ([SCORES.numpy() * 1j, torch.tensor([0, 1])], "numbers"),
        ([SCORES * torch.nan, torch.tensor([0, 1])], "row 0 has the score nan"),
        ([SCORES * torch.tensor([[1], [torch.inf]]), torch.tensor([0, 1])], "row 1 has the score inf"),
        ([SCORES.double() * 1e300, torch.tensor([0, 1])], r"row 0 has the score 3e\+300"),
        ([SCORES[:0], torch.tensor([])], "neither PySlowFast's"),
        ([SCORES[:, :0], torch.tensor([0, 1])], "neither PySlowFast's"),
        ([{"pred_score": SCORES[0], "gt_label": [0, 2]}], "neither PySlowFast's"),
        ([{"pred_score": SCORES[0], "gt_label": None}], "neither PySlowFast's"),
        ([{"pred_score": SCORES[0], "gt_label": 0}, 3], "neither PySlowFast's"),
        ([[0.1, 0.9], [0.3]], "neither PySlowFast's"),
        ([["0.1", "0.9"]], "neither PySlowFast's"),
        ([torch.zeros(1).expand(10**7, 10**6), torch.tensor([0])], "more than the file can hold"),
        ([SHARED_ROW] * 10_000, r"more than \d+ values"),
        ([[[SHARED_ROW] * 10_000] * 10_000, [0]], r"more than \d+ values"),
        ([[np.zeros(10_000)] * 10_000, [0] * 10_000], "more than the file can hold"),
        ([Address()], "no readable pickle"),
        (None, "neither PySlowFast's"),
        (3.0, "neither PySlowFast's"),
        ([{"pred_label": 1}], "pred_score"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_everything_else_is_refused_by_name(tmp_path: Path, capsys, content, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        read_foreign_scores(tmp_path / "a.pkl")
    assert "run" not in capsys.readouterr().out


def test_a_pickle_changes_no_function(tmp_path: Path) -> None:
    build = torch._utils._rebuild_tensor_v2  # which negates all weights that are read later, if it says so
    name = pickle.dumps(build, 2).removesuffix(pickle.STOP)
    state = pickle.dumps((None, {"__defaults__": ({"neg": True},)}), 2)[2:].removesuffix(pickle.STOP)
    (tmp_path / "a.pkl").write_bytes(name + state + pickle.BUILD + pickle.STOP)
    with pytest.raises(DataError, match=r"a\.pkl"):
        read_foreign_scores(tmp_path / "a.pkl")
    assert build.__defaults__ == (None,)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pkl", b"\x80\x04nonsense"),
        ("a.pkl", b""),
        ("a.json", b"{"),
        ("a.json", b""),
        ("a.json", b"[[NaN, 1]]"),
        ("a.json", b"[[1e999, 1]]"),
        ("a.json", '[["ä"]]'.encode("latin-1")),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.(pkl: no readable pickle|json)"):
        read_foreign_scores(tmp_path / name)
