"""Tables of scores: combined as the official code does, kept on disk, put together, read from other tools."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import unit
from synthetic_scores import score_table

from mvit_video.errors import DataError
from mvit_video.evaluation.importers import read_foreign_scores
from mvit_video.evaluation.metrics import measure
from mvit_video.evaluation.scoring import VideoScores
from mvit_video.evaluation.tables import (
    COMBINATIONS,
    ScoreLog,
    ScoreTable,
    aligned,
    class_matrix,
    combine,
    ensemble,
    map_classes,
    read_logs,
    read_scores,
    with_labels,
    write_scores,
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


@pytest.mark.parametrize("how", COMBINATIONS)
def test_combined_scores_are_probabilities(how: str) -> None:
    views = torch.rand(5, 3, 6).softmax(-1)
    torch.testing.assert_close(combine(views, how).sum(-1), torch.ones(5))


# Files


def test_a_file_gives_its_table_back(tmp_path: Path) -> None:
    table = replace(
        score_table(torch.rand(7, 3, 5).softmax(-1), [0, 1, 2, 3, 4, 0, 1]), facts={"a": [1, None]}
    )
    write_scores(table, tmp_path / "scores.parquet")
    found = read_scores(tmp_path / "scores.parquet")
    assert found.videos == table.videos
    assert found.class_names == table.class_names
    assert found.facts == table.facts
    assert torch.equal(found.views, table.views)
    assert torch.equal(found.spans, table.spans)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = score_table(torch.rand(7, 3, 5).softmax(-1), [0] * 7)
    write_scores(table, tmp_path / "a.parquet")
    rows = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(rows.take(np.random.default_rng(0).permutation(21)), tmp_path / "b.parquet")
    shuffled = with_labels(read_scores(tmp_path / "b.parquet"), table.videos, table.class_names)
    assert torch.equal(shuffled.views, table.views)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([0, 1, 2, 3, 4], "v1 has not each of the views 0 to 2"), ([0, 1, 2, 3, 4, 4], "v1 has not each")],
    ids=["missing", "twice"],
)
def test_uneven_views_are_named(tmp_path: Path, rows: list[int], message: str) -> None:
    import pyarrow.parquet as pq

    write_scores(score_table(torch.rand(2, 3, 5).softmax(-1), [0, 1]), tmp_path / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "a.parquet").take(rows), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / "b.parquet")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no Parquet file"):
        read_scores(tmp_path / "a.parquet")
    table = score_table(torch.full((2, 1, 3), torch.nan), [0, 1])
    write_scores(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="v0 has scores that are no numbers"):
        read_scores(tmp_path / "b.parquet")


# What a killed evaluation leaves


def videos_of(table: ScoreTable) -> list[VideoScores]:
    return [VideoScores(video, table.views[i], [(0.0, 1.0)] * 3) for i, video in enumerate(table.videos)]


def test_logs_are_read_up_to_where_a_process_was_killed(tmp_path: Path) -> None:
    table = score_table(torch.rand(6, 3, 4).softmax(-1), [0] * 6)
    facts = {"protocol": {"clip_frames": 8}, "path": "here"}
    for name, part in (("0", videos_of(table)[:3]), ("1", videos_of(table)[2:])):
        with ScoreLog(tmp_path / f"{name}.arrows", table.class_names, facts) as log:
            for scores in part:
                log.append(scores)
    whole = read_logs(tmp_path, table.class_names, facts, ["protocol"])
    assert whole is not None
    assert torch.equal(whole.views, table.views)  # the third once, though both have it
    content = (tmp_path / "1.arrows").read_bytes()
    for cut, least in ((len(content) - 9, 5), (len(content) // 2, 3), (100, 3), (0, 3)):
        (tmp_path / "1.arrows").write_bytes(content[:cut])
        found = read_logs(tmp_path, table.class_names, {**facts, "path": "there"}, ["protocol"])
        assert found is not None
        assert len(found) >= least
        assert torch.equal(found.views, table.views[: len(found)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": {"clip_frames": 16}}, "protocol.clip_frames is 8 there and 16 here"),
        ({"model_sha256": "ab"}, "model_sha256 is cd there and ab here"),
    ],
)
def test_logs_of_another_evaluation_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    table = score_table(torch.rand(1, 3, 4).softmax(-1), [0])
    facts = {"protocol": {"clip_frames": 8}, "model_sha256": "cd"}
    with ScoreLog(tmp_path / "0.arrows", table.class_names, facts) as log:
        log.append(videos_of(table)[0])
    with pytest.raises(DataError, match=message):
        read_logs(tmp_path, table.class_names, {**facts, **change}, list(facts))
    with pytest.raises(DataError, match="class_names is"):
        read_logs(tmp_path, ["other"] * 4, facts, list(facts))


def test_two_evaluations_do_not_write_one_log(tmp_path: Path) -> None:
    with (
        ScoreLog(tmp_path / "0.arrows", ["a"], {}),
        pytest.raises(DataError, match=r"0\.arrows .* another evaluation works in this folder"),
    ):
        ScoreLog(tmp_path / "0.arrows", ["a"], {})


# Labels, classes, several tables


def test_labels_and_predictions_must_meet() -> None:
    table = score_table(torch.rand(3, 1, 2).softmax(-1), [0, 1, 0])
    names = table.class_names
    with pytest.raises(DataError, match="v2: in the data set but not scored"):
        with_labels(score_table(table.views[:2], [0, 1]), table.videos, names)
    with pytest.raises(DataError, match="v2: scored but not in the data set"):
        with_labels(table, table.videos[:2], names)
    excused = replace(score_table(table.views[:2], [0, 1]), facts={"bad_videos": [{"id": "v2"}]})
    assert len(with_labels(excused, table.videos, names)) == 2
    unlabelled = replace(table, videos=(*table.videos[:2], replace(table.videos[2], label=None)))
    with pytest.raises(DataError, match="v2 has scores but no label"):
        measure(unlabelled)


def test_classes_map_by_name() -> None:
    known, scores = ["run", "jump", "swim"], torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    mapped = map_classes(scores, class_matrix(known, ["jump", "run"]))
    torch.testing.assert_close(mapped, torch.tensor([[0.375, 0.625], [0, 0]]))
    mapping = {"sport": ["run", "jump"], "water": "swim"}
    mapped = map_classes(scores, class_matrix(known, ["water", "sport"], mapping))
    torch.testing.assert_close(mapped, torch.tensor([[0.2, 0.8], [1, 0]]))


@pytest.mark.parametrize(
    ("wanted", "mapping", "message"),
    [
        (["jmup"], {}, r"no class 'jmup' \(did you mean 'jump'\?\)"),
        (["a", "b"], {"a": "run", "b": ["run"]}, "'run' of the model counts for two"),
        (["run"], {"rnu": "run"}, r"'rnu', which the data set lacks \(did you mean 'run'\?\)"),
    ],
)
def test_classes_without_counterpart_are_named(wanted: list[str], mapping: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_matrix(["run", "jump"], wanted, mapping)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Malicious()], r"a\.pkl: asks for builtins\.print; only numpy arrays"),
        ([OrderedDict(a=Path("x"))], r"asks for pathlib\.(_local\.)?PosixPath"),
        ([Storage()], "no readable pickle"),
        ({"a": 1}, "neither PySlowFast's"),
        ([], "neither PySlowFast's .* it is empty"),
        ([SCORES, torch.tensor([0, 1, 2])], "2 rows of scores, labels of shape"),
        ([SCORES, torch.tensor([0, 3])], "labels must be in 0 to 2"),
        ([SCORES * torch.nan, torch.tensor([0, 1])], "row 0 has scores that are no numbers"),
        ([{"pred_label": 1}], "pred_score"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_everything_else_is_refused_by_name(tmp_path: Path, capsys, content, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        read_foreign_scores(tmp_path / "a.pkl")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("a.pkl", b"\x80\x04nonsense"), ("a.pkl", b""), ("a.json", b"{")]
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.(pkl: no readable pickle|json: no json)"):
        read_foreign_scores(tmp_path / name)
