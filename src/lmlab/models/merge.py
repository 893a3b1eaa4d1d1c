"""Adapters folded into their base: one plain transformers model with the same logits, nothing of PEFT or bitsandbytes.

Every weight is computed as the adapter's own product uses it: the base read out of its storage (16 bits, int8, 4 bits),
plus ``scale * B A`` of each active adapter, in fp32, and rounded once to the type asked for. So a QLoRA adapter goes into
the dequantized base that it was trained on; merged into the 16-bit original it would correct for a rounding that is not
there. PEFT's own ``merge_and_unload`` adds to the *stored* weight and quantizes the sum again, which undoes small updates.

LoRA: arXiv 2106.09685, section 4.1; rsLoRA (2312.03732) has another scale only; DoRA (2402.09353), equation 5:
``m (W + scale B A) / ||W + scale B A||``, the norm taken over each row of ``[out, in]``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmlab.models.build import standard_attention
from lmlab.models.quantize import dense_weight, is_dense
from lmlab.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def merged(model: Any, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A new plain model, in eval mode and on the same device, that computes what ``model`` does.

    Folded in are the adapters that are active at the moment, each by its present scale: LoRA, rsLoRA and DoRA on linear
    layers and embeddings, LoRA on single parameters, trained token rows and whole modules (``modules_to_save``). A head that was tied to the
    embedding stays tied if both are still the same; otherwise the result's config says ``tie_word_embeddings: false``.
    ``model`` itself is not changed.

    Args:
        model: a PeftModel, or a transformers model (then only its storage changes).
        dtype: of all weights of the result; None: fp32.

    Raises:
        UserError: an adapter of a kind that has no merged form here.
    """
    dtype = dtype or torch.float32
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = _Source(base)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if config.tie_word_embeddings and not source.still_tied():
        config.tie_word_embeddings = False
    plain = _empty(type(base), config, dtype)
    kept: dict[int, nn.Parameter] = {}
    for prefix, target in plain.named_modules():
        for name, old in list(target.named_parameters(recurse=False)):
            if id(old) not in kept:  # a tied parameter is made once
                folded = source.tensor(prefix, name, target).to(dtype).contiguous()
                if folded.shape != old.shape:
                    raise _no_form(
                        f"{prefix}.{name} has shape {list(folded.shape)}, not {list(old.shape)}", prefix
                    )
                kept[id(old)] = nn.Parameter(folded, requires_grad=False)
            setattr(target, name, kept[id(old)])
        for name, buffer in list(target.named_buffers(recurse=False)):
            own = getattr(source.module(prefix), name, None)
            if isinstance(own, torch.Tensor) and own.shape == buffer.shape:
                setattr(target, name, own.detach().to(buffer.dtype).clone())
    if getattr(base, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(base.generation_config)
    device = next(base.parameters()).device
    return plain.to(device).eval()


def _empty(model_class: type, config: Any, dtype: torch.dtype) -> Any:
    """A model of this class whose parameters hold nothing yet; buffers that follow from the config are computed."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        made: Any = model_class
        plain = made._from_config(config, dtype=dtype, attn_implementation=standard_attention(config))
    plain.tie_weights()  # left out where nothing is initialised
    return plain


def _no_form(what: str, where: str) -> UserError:
    return UserError(
        f"the adapter cannot be merged: {what}",
        where=where,
        fix="export it with --adapter-only, beside its base",
    )


@dataclass(frozen=True)
class _Unwrapped:
    """A module of the base without PEFT's wrappers, and those of them that change its weight, innermost first."""

    module: Any
    layers: tuple[Any, ...]


class _Source:
    """The tensors of a base with adapters, by the names that they have without."""

    def __init__(self, base: Any) -> None:
        self._base = base

    def still_tied(self) -> bool:
        """Whether head and embedding, one matrix in the base, are one in the merged model too."""
        embedding, head = self._base.get_input_embeddings(), self._base.get_output_embeddings()
        if head is None:
            return True
        one, other = _unwrapped(embedding), _unwrapped(head)
        if one.module.weight is not other.module.weight:
            return False
        if not one.layers and not other.layers:
            return True
        return torch.equal(_weight(one, "embedding"), _weight(other, "head"))

    def module(self, prefix: str) -> Any:
        return self._at(prefix).module

    def tensor(self, prefix: str, name: str, target: nn.Module) -> torch.Tensor:
        """The parameter ``prefix.name`` for a plain ``target`` to hold, in fp32 where it was computed."""
        found = self._at(prefix)
        if on_it := [layer for layer in found.layers if getattr(layer, "parameter_name", None) == name]:
            return _experts(getattr(found.module, name), on_it)
        found = _Unwrapped(found.module, tuple(x for x in found.layers if not hasattr(x, "parameter_name")))
        if name == "weight" and (found.layers or is_dense(found.module)):
            weight = _weight(found, prefix)
            return weight.t() if type(target).__name__ == "Conv1D" else weight
        if name == "bias" and found.layers:
            return _bias(found)
        return getattr(found.module, name).detach()

    def _at(self, prefix: str) -> _Unwrapped:
        found = _unwrapped(self._base)
        for part in prefix.split(".") if prefix else ():
            found = _unwrapped(getattr(found.module, part))
        return found


def _unwrapped(module: Any) -> _Unwrapped:
    """Through PEFT's wrappers as its forward goes at the moment: active adapters only."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    layers: list[Any] = []
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            active = [] if module.disable_adapters else module.active_adapters
            whole = next((name for name in active if name in module.modules_to_save), None)
            module = module.original_module if whole is None else module.modules_to_save[whole]
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, (LoraLayer, TrainableTokensLayer)):
            if not module.disable_adapters and _unmerged(module):
                layers.insert(0, module)
            module = module.base_layer
        elif isinstance(module, BaseTunerLayer):
            raise _no_form(f"{type(module).__name__} is none of LoRA's layers", type(module).__name__)
        else:
            return _Unwrapped(module, tuple(layers))


def _unmerged(layer: Any) -> list[str]:
    """Names of the adapters in force on ``layer`` that its base does not hold already."""
    tensors: set[str] = set()
    for place in ("lora_A", "lora_embedding_A", "trainable_tokens_delta"):
        tensors |= set(getattr(layer, place, ()))
    return [name for name in layer.active_adapters if name in tensors and name not in layer.merged_adapters]


def _weight(found: _Unwrapped, where: str) -> torch.Tensor:
    """``[out, in]`` of a linear layer, ``[rows, width]`` of an embedding; a new tensor in fp32 if adapters are on it."""
    weight = (
        dense_weight(found.module, torch.float32) if is_dense(found.module) else found.module.weight.detach()
    )
    if not found.layers:
        return weight
    weight = original = weight.float()
    for layer in found.layers:
        if hasattr(layer, "trainable_tokens_delta"):
            weight = weight.clone()
            for name in _unmerged(layer):
                rows = torch.tensor(layer.token_indices[name], device=weight.device)
                weight[rows] = layer.trainable_tokens_delta[name].detach().to(weight)
        else:
            for name in _unmerged(layer):
                weight = weight + _update(layer, name, original, where)
    return weight


def _experts(parameter: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
    """A parameter that PEFT adapts as it is, without a layer around it (``target_parameters``: the experts of an MoE)."""
    value = parameter.detach().float()
    for layer in layers:
        for name in _unmerged(layer):
            value = value + layer.get_delta_weight(name).detach().float()
    return value


def _update(layer: Any, name: str, weight: torch.Tensor, where: str) -> torch.Tensor:
    """What one adapter adds to ``weight``, the layer's own."""
    variant = layer.lora_variant.get(name)
    is_linear, is_embedding = (
        is_dense(layer.get_base_layer()),
        isinstance(layer.get_base_layer(), nn.Embedding),
    )
    if not (is_linear or is_embedding) or (variant is not None and not layer.use_dora.get(name, False)):
        kind = type(variant if variant is not None else layer.get_base_layer()).__name__
        raise _no_form(f"{kind} has no merged form", where)
    if layer.lora_bias.get(name, False) and getattr(layer.get_base_layer(), "bias", None) is None:
        raise _no_form("it has a bias where its base has none", where)
    if is_embedding:
        low_rank = (layer.lora_embedding_B[name].float() @ layer.lora_embedding_A[name].float()).t()
    else:
        low_rank = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    change = low_rank.mul_(float(layer.scaling[name])).to(weight.device)
    if variant is None:
        return change
    moved = weight + change
    magnitude = layer.lora_magnitude_vector[name].weight.detach().float().to(weight.device)
    if is_linear:
        return moved * (magnitude / torch.linalg.vector_norm(moved, dim=1))[:, None] - weight
    return moved * (magnitude / torch.linalg.vector_norm(moved, dim=0)) - weight


def _bias(found: _Unwrapped) -> torch.Tensor:
    """The base's bias with those that adapters have on B (``lora_bias``)."""
    bias = found.module.bias.detach().float()
    for layer in found.layers:
        for name in _unmerged(layer):
            if getattr(layer, "lora_bias", {}).get(name, False):
                own = layer.lora_B[name].bias.detach().float() * float(layer.scaling[name])
                bias = bias + own.to(bias.device)
    return bias
