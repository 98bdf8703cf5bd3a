"""Training with parameters, gradients and optimizer states in shards (FSDP2), on GPUs as on CPUs.

Lightning's own ``fsdp`` needs GPUs. Checkpoints are single files, the same as those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map


class FullySharded(ModelParallelStrategy):
    """Each process keeps a share of every parameter; ``Classifier.configure_model`` cuts them up."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return _gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _gathered(optimizer.state_dict())

    # Every process reads the whole file and takes its share.
    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        self.lightning_module.load_state_dict(_sharded(checkpoint["state_dict"], own), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [n for group in state["param_groups"] for n in group["params"]]
            of_each = {
                number: _sharded(state["state"][number], dict.fromkeys(state["state"][number], parameter))
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": of_each})


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut up a model's parameters, block by block; what lies around the blocks is one part of its own.

    A block's kernels read the weights of layers below it, so nothing below a block is a part. Outside the
    forward and backward pass all parameters are in shards (``DTensor``), those of the outermost part too.
    """
    blocks = getattr(model, "blocks", ())
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _gathered(state: Any) -> Any:
    """A copy of a (nested) state dict with whole tensors, on the first process's CPU; all have to call it.

    In the others these tensors are empty.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if torch.distributed.get_rank() == 0 else tensor.new_empty(0)

    return tree_map(whole, dict(state))


def _sharded(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict with each tensor cut up as the one of that name and shape in ``like`` is."""

    def share(value: Any, other: Any) -> Any:
        if not isinstance(other, DTensor) or not isinstance(value, Tensor) or value.shape != other.shape:
            return value
        return distribute_tensor(
            value.to(other.device), other.device_mesh, other.placements, src_data_rank=None
        )

    return {name: share(value, like.get(name)) for name, value in state.items()}


class AveragedWeights(EMAWeightAveraging):
    """Lightning's moving average, in shards where the model is; it can be saved while it is validated."""

    _swapped = False  # the model has the averages, in validation

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._average_model = AveragedModel(
            pl_module, device=trainer.strategy.root_device, use_buffers=self._use_buffers, **self._kwargs
        )
        if isinstance(trainer.strategy, FullySharded):
            shard(cast(Any, self._average_model.module).model, trainer.strategy.device_mesh)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = _gathered(checkpoint["state_dict"])
        if self._swapped:  # in the middle of a validation
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = pl_module.state_dict()
        names = {"state_dict", "current_model_state"} & checkpoint.keys()
        states = {name: _sharded(checkpoint[name], own) for name in names}
        super().on_load_checkpoint(trainer, pl_module, {**checkpoint, **states})
