"""Several LoRA adapters of one base as a single one: the weighted sum of their updates.

An adapter adds scale * B A to a weight, with scale = alpha / r, or alpha / sqrt(r) under rsLoRA. The sum of
w_i * scale_i * B_i A_i is itself low-rank: side by side (``cat``) it is exact at the sum of the ranks. ``svd`` is the
best approximation of a given rank (Eckart and Young 1936), exact from the sum's own rank on. ``linear`` adds the A
and the B apart, so that products of different adapters' parts come in: cheap, of the same rank, and not the sum.
The arithmetic is PEFT's ``add_weighted_adapter``; how far its result is from the sum is measured here in fp64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lmlab.records import UserError

CombinationMethod = Literal["cat", "svd", "linear"]


@dataclass(frozen=True)
class Combined:
    """What came out.

    Attributes:
        rank: of the new adapter.
        relative_error: Frobenius distance of its updates from the exact weighted sums, over that of the sums, all
            layers taken together.
    """

    rank: int
    relative_error: float


def combine_adapters(
    model: Any,
    weights: Mapping[str, float],
    *,
    name: str,
    method: CombinationMethod = "cat",
    rank: int | None = None,
) -> Combined:
    """Add to PEFT's ``model`` the adapter ``name``, the sum of those in ``weights``; it is not made active.

    Rows of added tokens are values, not updates: where several adapters train one, the new row is their mean by
    weight.

    Args:
        weights: of adapters on the model; negative ones subtract.
        method: ``cat`` (exact, rank = sum of the ranks), ``svd`` (exact from the sum's rank on) or ``linear``
            (rough; adapters of one rank only).
        rank: of the result under ``svd``; None: the largest of theirs.

    Raises:
        UserError: an unknown adapter or method, what has no sum (DoRA, biases, modules trained whole), weights of
            rows that add up to nothing, or ranks that the method cannot take.
    """
    _refuse(model, weights, name, method, rank)
    with _as_templates(model, weights):
        model.base_model.add_weighted_adapter(
            list(weights),
            list(weights.values()),
            name,
            combination_type=method,
            svd_rank=rank,
            svd_full_matrices=False,
        )
    from lmlab.models.vocabulary import use_token_rows

    use_token_rows(model)
    _mean_rows(model, weights, name)
    return Combined(int(model.peft_config[name].r), _relative_error(model, weights, name))


def check_combination(weights: Mapping[str, float], method: str, rank: int | None) -> None:
    """What can be told of a combination without a model.

    Raises:
        UserError: weights that are no numbers or all 0, an unknown method, or a rank that it does not take.
    """

    def stop(what: str, fix: str) -> UserError:
        return UserError(what, where="adapters", fix=fix)

    if not weights:
        raise stop("nothing to combine", "name adapters and their weights")
    if wrong := [each for each, weight in weights.items() if not math.isfinite(weight)]:
        raise stop(f"the weight of '{wrong[0]}' is {weights[wrong[0]]}", "give a number")
    if not any(weights.values()):
        raise stop("all weights are 0", "give at least one another weight, or use the base alone")
    if method not in get_args(CombinationMethod):
        raise stop(f"unknown method '{method}'", f"one of {', '.join(get_args(CombinationMethod))}")
    if rank is not None and method != "svd":
        raise stop(
            f"rank={rank} with {method}, which has a rank of its own", "use method svd, or leave it out"
        )
    if rank is not None and rank < 1:
        raise stop(f"rank={rank}", "1 or more")


def check_target(folder: Path) -> None:
    """Raise UserError if there is something at ``folder``, or it cannot be made; nothing is made yet."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("there is something already", where=str(folder), fix="name a new directory")
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise unwritable(folder, f"{there} is no directory")
    if not os.access(there, os.W_OK):
        raise unwritable(folder, f"{there} is read-only")


def unwritable(folder: Path, why: str) -> UserError:
    """The error of a directory that cannot be written."""
    return UserError(f"cannot be written: {why}", where=str(folder), fix="name another directory")


def check_templates(infos: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for adapters trained with different templates: the sum can be asked in one way only.

    Args:
        infos: name -> its lmlab.json; one that does not say how it was trained takes any.
    """
    ways = {
        name: [info.get(key) for key in ("format", "template", "chat_template")]
        for name, info in infos.items()
        if "format" in info or "template" in info
    }
    for name, way in ways.items():
        if way != ways[first := next(iter(ways))]:
            raise UserError(
                f"adapter '{name}' was trained with another template than '{first}'",
                where="adapters",
                fix="combine adapters that are asked the same way",
            )


def _refuse(model: Any, weights: Mapping[str, float], name: str, method: str, rank: int | None) -> None:
    """Everything that has no weighted sum, before anything is changed."""
    from lmlab.models.adapter_files import check_name

    def stop(what: str, fix: str) -> UserError:
        return UserError(what, where="adapters", fix=fix)

    loaded = getattr(model, "peft_config", {})
    if unknown := [each for each in weights if each not in loaded]:
        raise stop(f"the model has no adapter '{unknown[0]}'", f"it has {', '.join(loaded) or 'none'}")
    check_combination(weights, method, rank)
    check_name(name, model)
    for each in weights:
        config = loaded[each]
        whole = [*(config.modules_to_save or ()), *(config.target_parameters or ())]
        if config.use_dora or config.bias != "none" or config.lora_bias or whole:
            why = "DoRA" if config.use_dora else f"modules trained whole ({whole[0]})" if whole else "biases"
            raise stop(f"adapter '{each}' has {why}, which cannot be summed", "combine plain LoRA adapters")
    for path, layer in _lora_layers(model):
        ranks = {layer.r[each] for each in weights if each in layer.r}
        if method == "linear" and len(ranks) > 1:
            raise stop(
                f"adapters of the ranks {', '.join(map(str, sorted(ranks)))} have no linear combination",
                "use method cat or svd",
            )
        most = min(layer.in_features, layer.out_features)
        if method == "svd" and ranks and (rank or max(ranks)) > most:
            raise stop(
                f"rank {rank} for {path}, whose weight has rank {most} at most", f"use rank {most} or less"
            )

    for _, layer in _row_layers(model):
        for row in {row for each in weights for row in layer.token_indices.get(each, ())}:
            if abs(_row_weight(layer, weights, row)) < 1e-6:
                raise stop(
                    f"the weights of the adapters that train token {row} add up to 0",
                    "give weights with another sum",
                )


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def _row_weight(layer: Any, weights: Mapping[str, float], row: int) -> float:
    """Sum of the weights of the adapters that train this row."""
    return sum(weight for each, weight in weights.items() if row in layer.token_indices.get(each, ()))


@contextmanager
def _as_templates(model: Any, names: Mapping[str, float]) -> Iterator[None]:
    """The adapters' configs as PEFT may take them for the new one's, for the time of a block.

    It copies the first one's, whatever the others say: rsLoRA's scale of sqrt(r) would then apply to what is summed
    already, patterns and layer lists of one would stand for all, and an initialisation like PiSSA's changes the base.
    """
    own = {name: model.peft_config[name] for name in names}
    targets = {name: {path for path, layer in _lora_layers(model) if name in layer.r} for name in names}
    rows: dict[str, set[int]] = {}
    for path, layer in _row_layers(model):
        for name in names:
            rows.setdefault(path, set()).update(layer.token_indices.get(name, ()))
    rows = {path: ids for path, ids in rows.items() if ids}
    for name, config in own.items():
        model.peft_config[name] = replace(
            config,
            target_modules=targets[name],
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            use_rslora=False,
            init_lora_weights=True,
            lora_dropout=0.0,
            trainable_token_indices={path: sorted(ids) for path, ids in rows.items()} or None,
        )
    tuner = model.base_model
    inject = tuner.inject_adapter

    def inject_in_fp32(base: Any, name: str) -> None:
        inject(base, name)
        tuner._cast_adapter_dtype(
            adapter_name=name
        )  # else it takes a 16-bit base's type, and the sum is rounded

    tuner.inject_adapter = inject_in_fp32
    try:
        yield
    finally:
        del tuner.inject_adapter
        model.peft_config.update(own)


def _row_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name PEFT knows it by, layer) of those with trained rows; a head tied to the embedding follows by itself."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for path, module in model.get_base_model().named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            yield path.removesuffix(".token_adapter"), module


@torch.no_grad()
def _mean_rows(model: Any, weights: Mapping[str, float], name: str) -> None:
    for _, layer in _row_layers(model):
        values = layer.trainable_tokens_delta[name]
        for position, row in enumerate(layer.token_indices[name]):
            own = {
                each: layer.trainable_tokens_delta[each][layer.token_indices[each].index(row)]
                for each in weights
                if row in layer.token_indices.get(each, ())
            }
            total = _row_weight(layer, weights, row)
            values[position] = sum(weights[each] / total * vector.double() for each, vector in own.items())


@torch.no_grad()
def _relative_error(model: Any, weights: Mapping[str, float], name: str) -> float:
    """Frobenius distance from the exact sums, in fp64, over their own size."""
    off = size = 0.0
    for _, layer in _lora_layers(model):
        exact = sum(weights[each] * _update(layer, each) for each in weights if each in layer.r)
        if isinstance(exact, torch.Tensor):
            off += float((_update(layer, name) - exact).square().sum())
            size += float(exact.square().sum())
    return (off / size) ** 0.5 if size else 0.0


def _update(layer: Any, name: str) -> torch.Tensor:
    """scale * B A of one adapter, fp64."""
    if name in layer.lora_A:
        up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    else:
        up, down = layer.lora_embedding_B[name], layer.lora_embedding_A[name]
    return layer.scaling[name] * up.double() @ down.double()
