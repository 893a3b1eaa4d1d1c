"""A model cut over several devices: each keeps its share of every weight, gradient and optimizer state.

torch's `fully_shard` (FSDP2, after ZeRO stage 3, arXiv 1910.02054): the weights of one decoder layer at a time are
gathered for its forward and its backward pass; embedding, last norm and head, the root, stay gathered from the one to the
other. The loss is a forward method of the root, as it reads the head's weight itself. Gradients are averaged into shares
after every micro-batch: kept whole until the last one, as DDP does, they would need a model's memory on every device.

Everything here is collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from lmlab.models.build import decoder_layers
from lmlab.models.head import base_model, in_chunks, loss_sum
from lmlab.records import RunFailedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LOSS = "lmlab_loss_sum"


def shard_model(model: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> None:
    """Cut ``model`` over the ranks of a mesh of one dimension, in place; it may still lie in host memory.

    Args:
        model: a causal LM of transformers or PEFT's around one, as a whole on every rank. Its parameters are others
            afterwards: an optimizer is made of the new ones.
        param_dtype: weights are gathered and multiplied in it, and stay fp32 as they are stored; None: as stored. Gradients
            are always summed in fp32.

    Raises:
        RunFailedError: its decoder layers cannot be told.
    """
    base = base_model(model)
    layers = decoder_layers(base, getattr(base.config.get_text_config(), "num_hidden_layers", None))
    if not layers:
        raise RunFailedError(
            f"the decoder layers of {type(base).__name__} cannot be told, so it is not sharded: use trainer.strategy=ddp",
            everywhere=True,
        )
    in_chunks(model)  # the form of its head is found by whole weights, and kept
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if mesh.device_type == "cpu":
            assert isinstance(module, FSDPModule)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    setattr(model, LOSS, partial(loss_sum, model))
    register_fsdp_forward_method(model, LOSS)


def sharded_loss_sum(model: nn.Module, *arguments: Any) -> torch.Tensor:
    """`head.loss_sum` of a sharded model: its root's weights are there while it runs."""
    return getattr(model, LOSS)(*arguments)


def shares(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What of each tensor lies on this rank; the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(values: Any, *, keep: bool) -> Any:
    """A state dict (nested as it may be) with every sharded tensor gathered, in host memory; tied ones stay one.

    Args:
        keep: on this rank; elsewhere each is gathered and dropped again. One at a time is on the device.
    """
    gathered: dict[tuple[Any, ...], torch.Tensor | None] = {}

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value.cpu() if keep and isinstance(value, torch.Tensor) else value
        share = value.to_local()
        # Gradients may be parts of one buffer. A storage's address would be 0 of every empty share.
        place = (share.untyped_storage()._cdata, share.storage_offset(), *value.shape)
        if place not in gathered:
            full = value.full_tensor()
            gathered[place] = full.cpu() if keep else None
        return gathered[place]

    with torch.no_grad():
        return tree_map(gather, values)


def whole_weights(model: nn.Module, *, keep: bool, trained_only: bool) -> dict[str, torch.Tensor] | None:
    """The model's state dict, gathered: for the rank that writes it (``keep``); None for the others.

    Args:
        trained_only: leave out what is frozen.
    """
    state = model.state_dict(keep_vars=True)
    chosen = {name: v.detach() for name, v in state.items() if v.requires_grad or not trained_only}
    found = whole(chosen, keep=keep)
    return found if keep else None


def share_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value``, a whole tensor on every rank, cut as ``like`` is and in its type, with memory of its own."""
    if not isinstance(like, DTensor):
        return value.to(like.device, like.dtype, copy=True)
    whole_value = value.to(like.device, like.dtype)
    cut = distribute_tensor(whole_value, like.device_mesh, like.placements, src_data_rank=None)
    return cut.clone()  # a share may be a view of the whole


def load_weights(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put whole tensors, as a checkpoint has them, into a sharded module; names it lacks are an error."""
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(share_of(value, own[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a plain optimizer's ``state_dict()`` into one whose parameters are sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def of(parameter: torch.Tensor, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
            return share_of(value, torch.empty_like(parameter, dtype=value.dtype))
        return value

    cut = {
        index: {name: of(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": cut})


@contextmanager
def same_logits(model: nn.Module) -> Iterator[None]:
    """Inside, the first rank's logits are everybody's: all must draw the same tokens, or one would wait for ever."""

    def hook(module: nn.Module, given: Any, output: Any) -> Any:
        output.logits = output.logits.contiguous()
        dist.broadcast(output.logits, 0)
        return output

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
