"""Published weights by name, fetched from a server of the test's own."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Command

import mvit_video as mv
from mvit_video.weights import published
from mvit_video.weights.published import PUBLISHED, PublishedWeights
from mvit_video.weights.pyslowfast import make_cfg

NANO = "mvitv2_nano_8x4"


class Server:
    """Serves ``files``; ``cut`` closes the connection halfway."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut = False
        self.length: str | None = None
        self.status = b""
        self.delay = 0.0
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                outer.requests.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                time.sleep(outer.delay)
                content = outer.files[name]
                if outer.status:
                    self.wfile.write(outer.status)
                    return
                self.send_response(200)
                self.send_header("Content-Length", outer.length or str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if outer.cut else content)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def model() -> mv.MViT:
    torch.manual_seed(0)
    return mv.create_model(NANO, num_classes=6)


def publish(
    monkeypatch, server: Server, file: str, content: bytes, name: str = "kinetics400", **more: Any
) -> None:
    server.files[file] = content
    entry = PublishedWeights(NANO, name, 6, f"{server.url}/{file}", "5x1", 0.0, 0.0, **more)
    monkeypatch.setattr(published, "PUBLISHED", (entry,))


def packed(model: mv.MViT) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model_state": model.state_dict()}, buffer)
    return buffer.getvalue()


def hashed_name(content: bytes) -> str:
    return f"nano-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_weights_are_fetched_once(monkeypatch, server: Server, model: mv.MViT, tmp_path: Path) -> None:
    content = packed(model)
    publish(monkeypatch, server, hashed_name(content), content)
    first = mv.create_model(NANO, weights="kinetics400")
    second = mv.create_model(NANO, weights="kinetics400")
    assert len(server.requests) == 1
    assert torch.equal(first.head.projection.weight, model.head.projection.weight)
    assert torch.equal(second.norm.weight, model.norm.weight)
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == [hashed_name(content)]


def test_another_number_of_classes_needs_a_new_head(monkeypatch, server: Server, model: mv.MViT) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    with pytest.raises(mv.CheckpointError, match=r"its head has 6 classes, the model has 2.*head=new"):
        mv.create_model(NANO, num_classes=2, weights="kinetics400")
    other = mv.create_model(NANO, num_classes=2, weights="kinetics400", head="new", drop_path=0.1)
    assert other.config.num_classes == 2
    assert other.config.drop_path == 0.1
    assert torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_broken_transfer_leaves_nothing(
    monkeypatch, server: Server, model: mv.MViT, tmp_path: Path, hashed: bool
) -> None:
    content = packed(model)
    publish(monkeypatch, server, hashed_name(content) if hashed else "nano.pyth", content)
    server.cut = True
    with pytest.raises(mv.CheckpointError, match=r"127\.0\.0\.1.*(arrived damaged|can't be fetched)"):
        mv.create_model(NANO, weights="kinetics400")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    server.cut = False
    mv.create_model(NANO, weights="kinetics400")


@pytest.mark.parametrize(("status", "length"), [(b"nonsense\r\n\r\n", None), (b"", "many")])
def test_a_server_that_answers_nonsense_is_one_line(
    monkeypatch, server: Server, model: mv.MViT, tmp_path: Path, status: bytes, length: str | None
) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    server.status, server.length = status, length
    with pytest.raises(mv.CheckpointError, match=r"can't be fetched .* by hand"):
        mv.create_model(NANO, weights="kinetics400")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_processes_that_start_at_once_fetch_once(
    monkeypatch, server: Server, model: mv.MViT, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    server.delay = 0.3
    entry = published.PUBLISHED[0]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=published.fetch, args=(entry,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == ["nano.pyth"]
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").iterdir()] == ["nano.pyth"]


def test_torchvisions_weights_bring_its_protocol(monkeypatch, server: Server, model: mv.MViT) -> None:
    publish(monkeypatch, server, "nano.pth", packed(model), "kinetics400_torchvision")
    protocol = mv.create_model(NANO, weights="kinetics400_torchvision").protocol
    assert (protocol.sampling, protocol.pixels) == ("torchvision", "torchvision")


def test_a_wrong_hash_is_refused(monkeypatch, server: Server, model: mv.MViT, tmp_path: Path) -> None:
    publish(monkeypatch, server, "nano-00000000.pth", packed(model))
    with pytest.raises(mv.CheckpointError, match=r"arrived damaged.*SHA-256"):
        mv.create_model(NANO, weights="kinetics400")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_a_missing_file_or_server_says_what_to_put_where(
    monkeypatch, server: Server, model: mv.MViT, tmp_path: Path
) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    server.files.clear()
    expected = r"can't be fetched .*; put nano\.pyth into .*checkpoints by hand"
    with pytest.raises(mv.CheckpointError, match=expected):
        mv.create_model(NANO, weights="kinetics400")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(mv.CheckpointError, match=expected):
        mv.create_model(NANO, weights="kinetics400")
    (tmp_path / "hub" / "checkpoints" / "nano.pyth").write_bytes(packed(model))
    mv.create_model(NANO, weights="kinetics400")


def test_unknown_weights_name_the_known() -> None:
    with pytest.raises(
        mv.ConfigError, match=r"no weights 'k400' of mvitv2_b_32x3; published are: kinetics400, ssv2"
    ):
        mv.create_model("mvitv2_b_32x3", weights="k400")
    with pytest.raises(mv.ConfigError, match="published are: none"):
        mv.create_model(NANO, weights="kinetics400")


def test_the_table_is_consistent() -> None:
    from torchvision.models.video import MViT_V1_B_Weights, MViT_V2_S_Weights

    assert {entry.model for entry in PUBLISHED} <= set(mv.list_models())
    assert len({(entry.model, entry.name) for entry in PUBLISHED}) == len(PUBLISHED)
    for entry in PUBLISHED:
        assert entry.url.startswith("https://")
        assert (entry.hash_prefix is not None) == ("torchvision" in entry.name)
    theirs = {w.url: w.meta["_metrics"]["Kinetics-400"] for w in (*MViT_V1_B_Weights, *MViT_V2_S_Weights)}
    ours = {e.url: {"acc@1": e.top1, "acc@5": e.top5} for e in PUBLISHED if "torchvision" in e.name}
    assert ours == theirs


def test_a_damaged_file_that_is_already_there_is_refused(
    monkeypatch, server: Server, model, tmp_path
) -> None:
    content = packed(model)
    publish(monkeypatch, server, hashed_name(content), content)
    mv.create_model(NANO, weights="kinetics400")
    (tmp_path / "hub" / "checkpoints" / hashed_name(content)).write_bytes(packed(model.half()))
    with pytest.raises(mv.CheckpointError, match=r"damaged or another file, its SHA-256 starts with \w{8}"):
        mv.create_model(NANO, weights="kinetics400")


def test_layout_is_believed_from_the_weights(monkeypatch, server: Server) -> None:
    layout = {"dim_mul_in_attention": False, "pool_q_every_block": False}
    other = mv.create_model(NANO, num_classes=6, **layout)
    publish(monkeypatch, server, "nano.pyth", packed(other))
    model = mv.create_model(NANO, weights="kinetics400", drop_path=0.1)
    assert model.config == replace(other.config, drop_path=0.1)


def test_a_publishers_name_that_tells_too_little_is_replaced(monkeypatch, server, model, tmp_path) -> None:
    publish(monkeypatch, server, "k400.pyth", packed(model), saved_as="nano.pyth")
    mv.create_model(NANO, weights="kinetics400")
    assert (tmp_path / "hub" / "checkpoints" / "nano.pyth").is_file()


def test_evaluation_of_published_weights_needs_their_classes(
    monkeypatch, command: Command, server: Server, model: mv.MViT, two_classes: Path
) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    done = command(
        "eval", f"model={NANO}", "model.weights=kinetics400", "weights=null", f"data.root={two_classes}"
    )
    assert done.code == 1
    assert all(text in done.err for text in ("6 classes", "class_map"))


def test_training_on_other_classes_needs_a_new_head(
    monkeypatch, command: Command, server: Server, model: mv.MViT, two_classes: Path
) -> None:
    publish(monkeypatch, server, "nano.pyth", packed(model))
    arguments = ["experiment=motion", "model.weights=kinetics400", f"data.root={two_classes}"]
    arguments += ["trainer.max_epochs=1", "batch_size=4", "num_workers=0"]
    refused = command("train", *arguments)
    assert refused.code == 1
    assert "its head has 6 classes, the model has 2" in refused.err
    taken = command("train", *arguments, "head=new")
    assert taken.code == 0, taken.err


def test_a_file_that_describes_another_layout_is_believed(monkeypatch, server: Server) -> None:
    """The published MViTv1 of 32 frames is deeper than the paper's."""
    torch.manual_seed(0)
    deeper = mv.create_model(NANO, num_classes=6, stages=(1, 2, 1))
    buffer = io.BytesIO()
    cfg = make_cfg(deeper.config, deeper.protocol)
    torch.save({"model_state": deeper.state_dict(), "cfg": yaml.safe_dump(cfg)}, buffer)
    publish(monkeypatch, server, "deeper.pyth", buffer.getvalue())
    other = mv.create_model(NANO, num_classes=9, weights="kinetics400", head="new", drop_path=0.1)
    assert len(other.blocks) == 4
    assert other.config.num_classes == 9
    assert other.config.drop_path == 0.1
    assert torch.equal(other.norm.weight, deeper.norm.weight)
