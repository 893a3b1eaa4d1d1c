"""Which modules of a model an adapter's settings mean, found on the model itself, with weights or without.

PEFT leaves out what matches nothing as long as something does, compares layer numbers only with lists, and takes every
name that ends like the one given (``norm`` is also ``input_layernorm``). Here every name must mean something, whole parts
of a path are compared, and what is found goes to PEFT as full paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lmlab.models.build import decoder_layers
from lmlab.models.quantize import replaceable
from lmlab.records import UserError

ALL_LINEAR = "all-linear"
PLAIN_STORAGE = ("none", "fp16", "bf16")
"""Storages that keep every weight a float."""


def target_paths(
    model: Any, wanted: str | Sequence[str], *, layers: Sequence[int] | None, exclude: str | Sequence[str]
) -> list[str]:
    """Paths of the layers that get an update.

    Args:
        wanted: ``all-linear`` (every linear layer but the head), names or ends of paths, or a regular expression for
            whole paths.
        layers: of these decoder layers only, negative ones counted from the end; None: wherever they are.
        exclude: names or an expression of what to leave out.

    Raises:
        UserError: a name that matches nothing (the message lists what there is), or a layer that is not there.
    """
    linear = _linear(model)
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    if wanted == ALL_LINEAR:
        found = [path for path in linear if modules[path] is not head]
    else:
        others = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
        found = _matching([*linear, *others], wanted, "target_modules", linear)
    if exclude:
        left_out = set(_matching([*found], exclude, "exclude_modules", found))
        found = [path for path in found if path not in left_out]
    if layers is not None:
        prefixes = _layer_prefixes(model, modules, layers)
        found = [path for path in found if path.startswith(prefixes)]
        if not isinstance(wanted, str):
            _matching(found, wanted, "target_modules", linear)
    if not found:
        raise UserError(
            f"target_modules={_told(wanted)} matches no layer"
            + (" that is left" if exclude or layers else ""),
            where="adapter.target_modules",
            fix=f"use all-linear or names of its linear layers: {_names(linear)}",
        )
    return found


def whole_paths(model: Any, names: Sequence[str], *, storage: str) -> list[str]:
    """Paths of the modules that are trained whole.

    Raises:
        UserError: a name that matches nothing, or a module with weights that ``storage`` packs into few bits.
    """
    modules = [path for path in dict(model.named_modules(remove_duplicate=False)) if path]
    found = _matching(modules, list(names), "modules_to_save", _linear(model))
    if storage not in PLAIN_STORAGE:
        packed = {id(module) for _, _, module in replaceable(model)}
        for path in found:
            if any(id(part) in packed for part in model.get_submodule(path).modules()):
                raise UserError(
                    f"modules_to_save={path} over quant={storage}: packed weights cannot be trained",
                    where="adapter.modules_to_save",
                    fix="name the head, the embedding or norms, or use quant=bf16",
                )
    return found


def outside(paths: Sequence[str], whole: Sequence[str]) -> list[str]:
    """Those of the layers ``paths`` that are in no module of ``whole``: what is trained whole needs no update.

    Raises:
        UserError: none is left.
    """
    left = [path for path in paths if not any(path == each or path.startswith(f"{each}.") for each in whole)]
    if paths and not left:
        raise UserError(
            f"modules_to_save={_told([path.rsplit('.', 1)[-1] for path in whole][:5])} holds every layer of target_modules",
            where="adapter.modules_to_save",
            fix="name other modules, or use adapter=none to train the whole model",
        )
    return left


def tied_paths(model: Any) -> tuple[str, ...]:
    """Paths of embedding and head where the two are one matrix, () where they are not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return ()
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(embedding)], paths[id(head)]


def _linear(model: Any) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def _matching(paths: Sequence[str], wanted: str | Sequence[str], key: str, there: Iterable[str]) -> list[str]:
    """Those of ``paths`` that ``wanted`` means; each name of a list must mean one, and what is excluded as well."""
    if isinstance(wanted, str) and not re.fullmatch(r"[\w.]+", wanted):
        try:
            matching = [path for path in paths if re.fullmatch(wanted, path)]
        except re.error as error:
            raise UserError(
                f"{key}={wanted} is no regular expression: {error}",
                where=f"adapter.{key}",
                fix="mend it, or give a list of names",
            ) from error
        if (
            not matching and key == "exclude_modules"
        ):  # of target_modules it is said with what else leaves none
            raise UserError(
                f"{key}={wanted} matches no layer",
                where=f"adapter.{key}",
                fix=f"expressions are compared with whole paths, as {next(iter(paths), 'none')}",
            )
        return matching
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, None] = {}
    for name in names:
        those = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not those:
            raise UserError(
                f"{key}={name} matches no {'module' if key == 'modules_to_save' else 'layer'}",
                where=f"adapter.{key}",
                fix=f"its linear layers are {_names(there)}",
            )
        found.update(dict.fromkeys(those))
    return list(found)


def _layer_prefixes(model: Any, modules: dict[str, Any], layers: Sequence[int]) -> tuple[str, ...]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stack = decoder_layers(model, count)
    if wrong := [index for index in layers if not -len(stack) <= index < len(stack)]:
        raise UserError(
            f"adapter.layers has {wrong[0]}, and the model has {len(stack)} layers",
            where="adapter.layers",
            fix=f"use 0 to {len(stack) - 1}" if stack else "use null: its layers cannot be told",
        )
    paths = {id(module): path for path, module in modules.items()}
    return tuple(f"{paths[id(stack[index])]}." for index in layers)


def _names(paths: Iterable[str]) -> str:
    """Their last parts, each once."""
    return ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))[:200] or "none"


def _told(wanted: str | Sequence[str]) -> str:
    return wanted if isinstance(wanted, str) else f"[{', '.join(wanted)}]"
