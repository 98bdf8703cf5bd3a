"""The report of an evaluation: one file that says what the table says, readable with many classes."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_scores import score_table, table_of_400_classes
from videos import read_number, write_numbered_video

from mvit_video.data.decode import open_video
from mvit_video.evaluation.report import frames_of, most_wrong_view
from mvit_video.evaluation.results import report

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A parsed page: its text, the text of each table's rows, its images; unbalanced tags are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.images, self.addresses = "", {}, []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] | None = None
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images[values["alt"]] = values["src"]
        self.addresses += [values[name] for name in ("src", "href", "srcset", "data") if values.get(name)]
        if tag == "table":
            self._rows = self.tables.setdefault(values.get("id") or f"table {len(self.tables)}", [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data.strip()


def picture(uri: str) -> np.ndarray:
    kind, content = uri.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


@pytest.fixture(scope="module")
def folder_of_400(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("of_400")
    names = [f"class {index}" for index in range(400)]
    names[0] = "counting $5 <b>&amp; $6"
    provenance = {"bad_videos": [{"id": "x", "path": "/nowhere/<x>.mp4", "reason": "no frames"}]}
    table = replace(table_of_400_classes(), class_names=tuple(names), provenance=provenance)
    report({"": table}, folder, how="mean", seed=0, num_mistakes=5)
    return folder


def test_a_page_of_400_classes_says_what_the_table_says(folder_of_400: Path) -> None:
    page = Page(folder_of_400 / "report.html")
    assert page.tables["summary"][1][:2] == ["videos", "86.60 %"]
    assert page.tables["summary"][2][1] == "91.07 %"
    assert page.tables["pairs"][1] == ["1", "counting $5 <b>&amp; $6", "class 1", "4", "40.00 %"]
    assert len(page.tables["pairs"]) == 21
    classes = page.tables["classes"][1:]
    assert len(classes) == 400
    assert [row[2] for row in classes] == ["60.00 %"] * 134 + ["100.00 %"] * 266
    assert "1 videos could not be read (1 of them are missing)" in page.text
    assert page.tables["bad"] == [["/nowhere/<x>.mp4", "no frames"]]
    assert page.text.count("predicted as") == 5
    assert "expected calibration error 0.2558" in page.text


def test_a_page_needs_nothing_else(folder_of_400: Path) -> None:
    page = Page(folder_of_400 / "report.html")
    assert {urlsplit(address).scheme for address in page.addresses} == {"data"}
    assert set(page.images) == {
        "Confusion matrix",
        "The classes that are most confused",
        "Accuracy of each class",
        "Calibration",
        "Accuracy against the number of views",
    }
    for uri in page.images.values():
        assert picture(uri).std() > 10  # something is drawn
    for name in ("confusion", "confusion_part", "per_class", "calibration", "views"):
        assert Image.open(folder_of_400 / f"{name}.png").size[0] > 400


def test_mistakes_are_shown_with_frames(tmp_path: Path) -> None:
    good = write_numbered_video(tmp_path / "a.mp4", 20, height=48, width=64, fps=10)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    table = score_table(torch.eye(3)[[1, 2, 2]][:, None], [0, 1, 2])
    paths = (str(good), str(tmp_path / "broken.mp4"), str(good))
    videos = tuple(replace(v, path=p) for v, p in zip(table.videos, paths, strict=True))
    spans = torch.tensor([[0.4, 1.4]], dtype=torch.float64).expand(3, 1, 2)
    table = replace(table, videos=videos, spans=spans)
    report({"": table}, tmp_path, how="mean", seed=0, num_mistakes=9, open_file=open_video)
    page = Page(tmp_path / "report.html")
    assert page.text.count("predicted as") == 2
    strips = [uri for alt, uri in page.images.items() if alt.startswith("frames of")]
    assert len(strips) == 1
    assert picture(strips[0]).shape[:2] == (96, 6 * (128 + 2))
    assert (tmp_path / "worst_mistakes.png").exists()
    (clip,) = (address for address in page.addresses if address.startswith("data:video/mp4;base64,"))
    with av.open(io.BytesIO(base64.b64decode(clip.split(",")[1]))) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    # The view of seconds 0.4 to 1.4, at ten frames a second.
    assert [read_number(frame) for frame in frames] == list(range(4, 15))


def test_a_clip_shows_the_view_that_is_most_wrong() -> None:
    views = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]])
    spans = torch.tensor([[[0, 1], [2, 3], [4, 5]]], dtype=torch.float64)
    assert most_wrong_view(replace(score_table(views, [0]), spans=spans), 0) == (2, 3)


@pytest.mark.parametrize("span", [(math.nan, math.nan), (0.0, 0.0), (5.0, 9.0)])
def test_without_a_usable_span_the_clip_is_of_the_whole_video(
    tmp_path: Path, span: tuple[float, float]
) -> None:
    path = write_numbered_video(tmp_path / "a.mp4", 20, height=48, width=64)
    shown = frames_of(str(path), span, open_video)
    with av.open(io.BytesIO(shown["clip"])) as file:
        numbers = [read_number(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    assert (numbers[0], numbers[-1], len(numbers)) == (0, 19, 16)


def test_tables_to_paste(tmp_path: Path) -> None:
    names = ("=1+1", "50% | a_b & {c}", "x\\y", "café")
    table = replace(score_table(torch.eye(4)[[0, 1, 1, 2]][:, None], [0, 1, 2, 2]), class_names=names)
    report({"": table}, tmp_path, how="mean", seed=0, num_mistakes=0)
    with (tmp_path / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = {row.pop("class"): row for row in csv.DictReader(file)}
    assert list(rows) == ["'=1+1", names[1], names[2]]  # no formula for a spreadsheet
    assert {key: float(value) for key, value in rows[names[1]].items()} == pytest.approx(
        {"support": 1, "precision": 0.5, "recall": 1, "recall_low": 0.2065, "recall_high": 1, "f1": 2 / 3},
        abs=1e-4,
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["balanced_accuracy"] == found["mean_class_accuracy"] == pytest.approx(5 / 6)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    low, high = found["macro_f1_interval"]
    assert 0 < low < high <= 1
    row = found["per_class"][names[2]]
    assert (row["support"], row["videos"], row["recall"], row["top1"]) == (2, 2, 0.5, 0.5)
    markdown = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| top-1 | 75.00 | 30.06 to 95.44 |" in markdown
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (0, 4, 7) for line in markdown.splitlines())
    latex = (tmp_path / "tables.tex").read_text(encoding="utf-8")
    assert r"50\% \textbar{} a\_b \& \{c\} & 1 & 50.00 & 100.00 & 20.65 to 100.00 & 66.67 \\" in latex
    assert r"x\textbackslash{}y & 2" in latex


def test_the_page_says_what_was_measured_and_how(tmp_path: Path) -> None:
    known = {"date": "2026-01-02T03:04:05", "model_name": "a_model", "weights": "best.ckpt"}
    known |= {"command": "mvit-eval data.root='my videos'", "data": {"root": "/data/my videos"}}
    table = replace(score_table(torch.eye(2)[:, None], [0, 1]), provenance=known)
    report({"": table}, tmp_path, how="mean", seed=0, num_mistakes=0)
    told = dict(Page(tmp_path / "report.html").tables["about"])
    assert told == {
        "model": "a_model",
        "weights": "best.ckpt",
        "data": "/data/my videos",
        "date": "2026-01-02T03:04:05",
        "command": "mvit-eval data.root='my videos'",
    }
    report({"": replace(table, provenance={})}, tmp_path, how="mean", seed=0, num_mistakes=0)
    assert Page(tmp_path / "report.html").tables["about"] == [["data", "/videos"]]


@pytest.mark.parametrize("count", [3, 50])
def test_figures_of_long_names_are_no_larger_than_a_screen_can_show(tmp_path: Path, count: int) -> None:
    labels = torch.arange(count).repeat_interleave(4)
    scores = torch.eye(count)[torch.where(torch.arange(len(labels)) % 4 == 0, (labels + 1) % count, labels)]
    names = tuple(f"something {index} into something with a rather long name" for index in range(count))
    table = replace(score_table(scores[:, None], labels.tolist()), class_names=names)
    report({"": table}, tmp_path, how="mean", seed=0, num_mistakes=0)
    report({"a": table, "b": table}, tmp_path / "two", how="mean", seed=0, num_mistakes=0)
    for name in ("confusion.png", "per_class.png", "two/comparison.png"):
        width, height = Image.open(tmp_path / name).size
        assert max(width, height) < 3000
        assert min(width, height) > 200


def test_a_perfect_model_has_a_page_too(tmp_path: Path) -> None:
    report({"": score_table(torch.eye(2)[:, None], [0, 1])}, tmp_path, how="mean", seed=0, num_mistakes=3)
    page = Page(tmp_path / "report.html")
    assert page.tables["summary"][1][1] == "100.00 %"
    assert "no mistakes" in page.text


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    table = table_of_400_classes()
    first_views = replace(table, views=table.views[:, :1], spans=table.spans[:, :1])  # all are right
    report({"a": table, "b": first_views}, folder, how="mean", seed=0, num_mistakes=0)
    return folder


def test_a_comparison_has_a_page(comparison: Path) -> None:
    page = Page(comparison / "report.html")
    assert [row[:2] for row in page.tables["summary"][1:]] == [["a", "86.60 %"], ["b", "100.00 %"]]
    row = page.tables["comparisons"][1]
    assert row[:3] == ["a", "b", "+13.40 points"]
    assert row[4:6] == ["0", "536"]
    found = json.loads((comparison / "results.json").read_text())["comparisons"][0]
    assert found["p_value"] == pytest.approx(2.0**-535)
    assert found["per_class"]["class 0"] == pytest.approx(0.4)
    assert found["per_class"]["class 1"] == 0
    assert Image.open(comparison / "comparison.png").size[0] > 400


@pytest.mark.browser
@pytest.mark.parametrize("name", ["folder_of_400", "comparison"])
def test_a_browser_shows_the_page(browser, name: str, request: pytest.FixtureRequest) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: requests.append(asked.url))
    address = (request.getfixturevalue(name) / "report.html").as_uri()
    page.goto(address)
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert images
    assert all(complete and natural > 400 and shown > 300 for complete, natural, shown in images)
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 24, 27)"]
    rows = page.locator("#summary tr").all_inner_texts()
    assert any("86.60 %" in row for row in rows)
    if name == "folder_of_400":
        assert page.locator("#pairs tr").count() == 21
        assert not page.locator("#classes").is_visible()
        page.locator("summary").click()
        assert page.locator("#classes").is_visible()
        button = page.locator("#classes th button:has-text('precision')")
        precisions = "[...document.querySelectorAll('#classes tbody tr')].map(r => +r.cells[5].dataset.value)"
        for falling in (True, False):
            button.press("Enter")
            found = page.evaluate(precisions)
            assert found == sorted(found, reverse=falling)
            assert found[0] != found[-1]
