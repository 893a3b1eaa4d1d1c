"""Adapter directories put on a base, one or several: nothing in them is run, no tensor is left over, none is missing.

The files are PEFT's. It loads what fits and warns about the rest at most; here an adapter that does not fit is an
error, since a half-loaded one still writes text.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lmlab.journal import beside, publish_folder, read_json, write_json
from lmlab.records import UserError

FOREIGN = ("megatron_config",)
"""Fields of an adapter_config.json by which PEFT would import a module that the file names."""
HARMLESS_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""Values of ``init_lora_weights`` (PEFT compares some without regard to case) that leave the base as it is.

Under the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) PEFT subtracts the first update from it, at every loading.
"""
UNKNOWN = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Fields of adapters that need a base, a call or a layer of their own."""


def check_adapter(path: Path) -> None:
    """Refuse what would run code, or would not leave the base as it is, before anything of it is read.

    Raises:
        UserError: weights in a pickle file alone, a config that is none, one that names code to import, or an adapter
            of a kind that does not lie beside an unchanged base.
    """
    config = read_json(path / "adapter_config.json")
    init = str(config.get("init_lora_weights", True))
    what = None
    if foreign := [name for name in FOREIGN if config.get(name)]:
        what = f"names code to import ({foreign[0]})"
    elif str(config.get("peft_type")) != "LORA":
        what = f"is of type {config.get('peft_type')!r}"
    elif init.lower() not in HARMLESS_INITS:
        what = f"was made with init_lora_weights={init}, which changes the base"
    elif config.get("bias", "none") != "none":
        what = f"brings biases of its base (bias={config['bias']})"
    elif unknown := [name for name in UNKNOWN if config.get(name)]:
        what = f"uses {unknown[0]}"
    if what is not None:
        raise UserError(
            f"the adapter {what[:100]}",
            where=str(path / "adapter_config.json"),
            fix="LoRA adapters as lmlab or PEFT save them"
            + (
                "; PEFT converts it with path_initial_model_for_weight_conversion"
                if "changes" in what
                else ""
            ),
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(
            "no adapter_model.safetensors",
            where=str(path),
            fix="a pickle file (.bin) is not opened: save it as safetensors",
        )


def check_name(name: str, model: Any) -> None:
    """Refuse a name that PEFT could not tell from a part of the model.

    Raises:
        UserError: not one word, taken, or the name of a module or of a method of torch's containers.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = {part for path, _ in base.named_modules() for part in path.split(".")}
    parts |= set(getattr(model, "peft_config", ()))
    if not re.fullmatch(r"[\w-]+", name) or name in parts or hasattr(nn.ModuleDict(), name):
        raise UserError(
            f"'{name}' cannot name an adapter of this model",
            where="adapters",
            fix="use letters, digits, _ and -, and a name that no adapter and no layer of it has",
        )


def put_on(model: Any, path: Path, *, name: str = "default", alone: bool = True) -> Any:
    """The adapter of ``path`` on a base, or beside those already there; every tensor in a place, every place filled.

    The first one is active; a further one waits until `using_adapter` names it.

    Args:
        model: a transformers model, or PEFT's around one with other adapters on it.
        alone: no other adapter will lie on this base; then the file may bring whole embeddings, which replace its own:
            if they differ, `using_adapter` refuses to give the bare base.

    Returns:
        PEFT's model, in eval mode and frozen.

    Raises:
        UserError: a damaged file, tensors that are not those of this base, or a name that is taken or impossible.
    """
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    from lmlab.models.lora import use_fused_lora
    from lmlab.models.vocabulary import use_token_rows

    check_name(name, model)
    try:
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            given = set(file.keys())
            differing = {key for key in given if ".lora_" not in key and _differs(file, key, model)}
        adapted = _load(model, path, name)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the adapter cannot be loaded: {detail}", where=str(path), fix="use one made for this base"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    if missing := sorted(wanted - given) or sorted(key for key in given - wanted if ".lora_" in key):
        raise UserError(
            f"the adapter does not fit its base: {len(missing)} tensors without a partner, {missing[0]} the first",
            where=str(path),
            fix="use one made for this base",
        )
    if not alone and (foreign := sorted(given - wanted)):
        raise UserError(
            f"the adapter brings a tensor of its base, which others would see ({foreign[0]})",
            where=str(path),
            fix="load it alone, or save it with save_embedding_layers=False",
        )
    adapted.replaced_in_base = sorted((given - wanted) & differing)
    use_token_rows(adapted)
    use_fused_lora(adapted)
    return adapted


def _differs(file: Any, key: str, base: Any) -> bool:
    """Whether the tensor ``key`` of an open safetensors file stands in ``base`` with other values."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    try:
        own = base.get_parameter(name)
    except AttributeError:  # none of the base's
        return False
    return not torch.equal(file.get_tensor(key).to(own), own)


def _load(model: Any, path: Path, name: str) -> Any:
    """PEFT's own loading, with modules trained whole in fp32."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    from lmlab.models.lora import reading_any_storage
    from lmlab.models.whole import train_in_fp32

    with reading_any_storage():
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), name, torch_device=str(model.device))
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, str(path), adapter_name=name)
    if train_in_fp32(adapted):  # what was rounded is read once more
        set_peft_model_state_dict(adapted, load_file(path / "adapter_model.safetensors"), adapter_name=name)
        adapted.requires_grad_(False)
    return adapted


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Inside the block ``model`` computes with the adapter ``name`` alone, with None as its bare base.

    Nothing is loaded or merged: logits are the same bits as before, whatever was switched to in between. What was in
    force comes back afterwards, and what required gradients does again.

    Raises:
        UserError: no adapter of that name, or a base whose embedding an adapter's file replaced.
    """
    loaded: list[str] = list(getattr(model, "peft_config", {}))
    if name is not None and name not in loaded:
        there = f"it has {', '.join(loaded)}" if loaded else "it has none"
        raise UserError(f"the model has no adapter '{name}'", where="adapter", fix=there)
    if not loaded:
        yield
        return
    if name is None and (replaced := getattr(model, "replaced_in_base", [])):
        raise UserError(
            f"the adapter replaced a tensor of its base ({replaced[0]}), which is not there any more",
            where="adapter",
            fix="load the base by its own name",
        )
    before = list(model.active_adapters)
    enabled = model.get_model_status().enabled is not False
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        _switch(model, [name] if name else before, enabled=name is not None)
        yield
    finally:
        _switch(model, before, enabled=enabled)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _switch(model: Any, names: list[str], *, enabled: bool) -> None:
    if names != list(model.active_adapters):
        if len(names) == 1:
            model.set_adapter(names[0], inference_mode=True)
        else:  # several at once: PEFT's model takes one name, the tuner inside takes all
            model.base_model.set_adapter(names, inference_mode=True)
            model.active_adapter = names
    if enabled:
        model.base_model.enable_adapter_layers()
    else:
        model.base_model.disable_adapter_layers()


def save_adapter(
    model: Any, name: str, tokenizer: Any, target: Path, *, base: str, info: dict[str, Any]
) -> None:
    """One of PEFT's ``model``'s adapters as a directory that PEFT alone loads, by rename, with its lmlab.json.

    Raises:
        OSError: it cannot be written.
    """
    config = model.peft_config[name]
    config.base_model_name_or_path, config.revision = base, info.get("base_revision")
    temporary = beside(target, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, selected_adapters=[name], save_embedding_layers=False)
        inside = temporary if name == "default" else temporary / name  # PEFT's way with every other name
        tokenizer.save_pretrained(inside)
        write_json(inside / "lmlab.json", info, sync=True)
        publish_folder(inside, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
