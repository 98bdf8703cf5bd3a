"""A model in a repository of the Hugging Face Hub, with a card that tells what it is and how good."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvit_video.errors import CheckpointError, ConfigError, import_extra, refusing
from mvit_video.io.console import printable
from mvit_video.io.writing import replacing, write_json
from mvit_video.model.base import VideoModel
from mvit_video.weights.checkpoint import save_weights
from mvit_video.weights.description import model_metadata
from mvit_video.weights.hub import WEIGHTS, parse
from mvit_video.weights.reading import METADATA_KEY


def push_to_hub(
    model: VideoModel, address: str, *, results: Mapping[str, Any] | None = None, licence: str | None = None
) -> str:
    """Put a model into a repository, which is made (private) if there is none; gives its web address.

    Args:
        results: of an evaluation (results.json), for the model card.
        licence: as the Hub names it, such as "apache-2.0".
    """
    repo, revision, file = parse(address)
    if revision or file:
        raise ConfigError(f"{address}: models are saved as hf://user/name")
    hub = import_extra("huggingface_hub", "hub", address)
    with tempfile.TemporaryDirectory() as folder, refusing(CheckpointError, address, but=(ConfigError,)):
        write_repository(model, Path(folder), repo, results=results, licence=licence)
        api = hub.HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model")
        return f"{api.endpoint}/{repo}"


def write_repository(
    model: VideoModel,
    folder: Path,
    repo: str,
    *,
    results: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> None:
    """The files of a repository: weights, ``config.json`` (with clip spec and class names), model card."""
    save_weights(model, folder / WEIGHTS)
    config = {"library_name": "mvit-video", METADATA_KEY: model_metadata(model)}
    write_json(folder / "config.json", config)
    with replacing(folder / "README.md", "w", encoding="utf-8") as file:
        file.write(model_card(model, repo, results, licence))


def model_card(
    model: VideoModel, repo: str, results: Mapping[str, Any] | None = None, licence: str | None = None
) -> str:
    """Markdown with the Hub's header: how to use the model, what it takes and how good it is."""
    from huggingface_hub import EvalResult, ModelCardData

    spec, names = model.protocol, model.class_names or ()
    name = repo.split("/")[-1]
    evaluations = []
    if results:
        folder = (results.get("data") or {}).get("root") or results.get("data_path") or "videos"
        data = Path(str(folder)).name
        evaluations = [
            EvalResult("video-classification", data, data, kind, results[key], metric_name=key)
            for key, kind in (("video_top1", "accuracy"), ("video_top5", "accuracy"), ("map", "mAP"))
            if key in results
        ]
    header = ModelCardData(
        license=licence,
        library_name="mvit-video",
        pipeline_tag="video-classification",
        tags=["video-classification", "mvit"],
        model_name=name,
        eval_results=evaluations or None,
    )
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"Model: {type(model).__name__}, {parameters:.1f} M parameters, {model.config.num_classes} classes; "
        "made with mvit-video.",
        f'```python\nimport mvit_video as mv\n\nmodel = mv.load_model("hf://{repo}")\n'
        'print(mv.predict(["video.mp4"], model))\n```',
        f"```sh\nmvit-predict video.mp4 weights=hf://{repo}\n```",
        f"Clips: {printable(str(spec))}.",
        *_evaluation(results),
    ]
    if names:
        shown = ", ".join(printable(name) for name in names[:50])
        lines.append(f"Classes: {shown}{f' and {len(names) - 50} more' if len(names) > 50 else ''}.")
    return "\n\n".join(lines) + "\n"


def _evaluation(results: Mapping[str, Any] | None) -> list[str]:
    """A table of the accuracies with their 95 % intervals, and what they were measured on."""
    if not results:
        return ["It hasn't been evaluated yet."]
    rows = ["| metric | value | 95 % interval |", "|---|---|---|"]
    for key in ("video_top1", "video_top5", "clip_top1", "mean_class_accuracy", "map"):
        if isinstance(value := results.get(key), int | float):
            interval = " to ".join(f"{end:.4f}" for end in results.get(f"{key}_interval") or ())
            rows.append(f"| {key} | {value:.4f} | {interval} |")
    settings = {
        "videos": results.get("videos"),
        "split": results.get("split"),
        "protocol": results.get("protocol"),
        "date": results.get("date"),
        "SHA-256 of the weights": results.get("model_sha256"),
    }
    told = "; ".join(f"{key}: {printable(str(value))}" for key, value in settings.items() if value)
    return ["\n".join(rows), told]
