"""The stages of a training that only the Trainer sees."""

from __future__ import annotations

from pytorch_lightning.profilers import Profiler

from mvit_video.data.timing import clock


class StageProfiler(Profiler):
    """Takes the stages "transfer" and "model" from what the Trainer says it does."""

    def __init__(self) -> None:
        super().__init__()
        self._outer: list[str] = []

    def start(self, action_name: str) -> None:
        current, name = clock(), _stage_of(action_name)
        if current is not None and name is not None:
            self._outer.append(current.switch(name))

    def stop(self, action_name: str) -> None:
        current = clock()
        if current is not None and _stage_of(action_name) is not None:
            current.switch(self._outer.pop())


def _stage_of(action: str) -> str | None:
    if action.endswith(".batch_to_device"):
        return "transfer"
    return "model" if action == "run_training_batch" or action.endswith("Strategy.validation_step") else None
