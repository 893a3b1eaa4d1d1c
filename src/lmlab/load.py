"""Trained weights brought back for scripts: a run, an adapter over its base, a model directory or a hub model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.assemble import prompting_of, store_base, text_generator
from lmlab.data.formats import Prompting
from lmlab.journal import read_json
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.generation.text import TextGenerator
    from lmlab.models.build import Pretrained
    from lmlab.models.hardware import Hardware


@dataclass(frozen=True)
class UsableModel:
    """A trained model for scripts.

    Attributes:
        prompting: from a question to the prompt as it was trained.
        sampler: the sampler of its run, as plain values; {} if it has none.
    """

    generator: TextGenerator
    prompting: Prompting
    sampler: dict[str, Any]


def load_for_use(name_or_path: str, *, accelerator: str = "auto", use_best: bool = False) -> UsableModel:
    """Load a run directory, an adapter, a model directory or a hub model for generation.

    Args:
        name_or_path: a run's directory stands for its ``adapter/`` or ``model/``.
        use_best: of a run, the weights with the best validation loss instead of the last.

    Raises:
        UserError: nothing usable there, or an adapter whose base is gone or is another one.
    """
    from transformers.utils.logging import disable_progress_bar

    from lmlab.models.build import hidden_size
    from lmlab.models.hardware import choose_hardware

    disable_progress_bar()
    path = _weights_folder(Path(name_or_path), use_best=use_best)
    info = read_json(path / "lmlab.json") if path is not None else {}
    storage = (info.get("quant") or {}).get("kind") if info.get("base_fingerprint") else None
    adapted = path is not None and (path / "adapter_config.json").is_file()
    source = _base_of(path, info) if path is not None and adapted else str(path or name_or_path)
    about = _stored_model(source, info.get("base_revision") if adapted else None)
    hardware = choose_hardware(
        accelerator, "auto", frozen_storage=storage, hidden_size=lambda: hidden_size(about.hf_config(None))
    )
    hf_config = about.hf_config(None)
    if path is not None and adapted:
        model, tokenizer, generation_config = _load_adapter(path, info, about, hf_config, hardware)
    else:
        model, tokenizer = _load_plain(about, hf_config, hardware)
        generation_config = model.generation_config
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompting = prompting_of(info, tokenizer)
    attn = base.config._attn_implementation
    generator = text_generator(model.eval(), tokenizer, hardware, generation_config, attn, prompting)
    return UsableModel(generator, prompting, info.get("sampler") or {})


def _weights_folder(path: Path, *, use_best: bool) -> Path | None:
    """The folder with weights that ``path`` means, None if it is not a local directory."""
    if not path.is_dir():
        return None
    roots = [path / "best"] if use_best else [path]
    for root in roots:
        for name in ("adapter", "model"):
            if (root / name).is_dir():
                return root / name
    return path


def _stored_model(source: str, revision: str | None = None) -> Pretrained:
    from lmlab.models.build import Pretrained

    return Pretrained(
        kind="pretrained",
        name_or_path=source,
        revision=revision,
        trust_remote_code=False,
        gradient_checkpointing=False,
    )


def _base_of(path: Path, info: dict[str, Any]) -> str:
    source = info.get("base") or read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not source:
        raise UserError(
            "the adapter does not name its base", where=str(path), fix="set base_model_name_or_path in it"
        )
    return source


def _load_plain(about: Pretrained, hf_config: Any, hardware: Hardware) -> tuple[Any, Any]:
    import torch

    from lmlab.models.build import build_model
    from lmlab.tokenizers import load_tokenizer

    model = build_model(about, hf_config, seed=0, dtype=torch.float32, device=hardware.device)
    return model, load_tokenizer(about.source)


def _load_adapter(
    path: Path, info: dict[str, Any], about: Pretrained, hf_config: Any, hardware: Hardware
) -> tuple[Any, Any, Any]:
    """Base as it was trained on (same quantization, same fingerprint) with the adapter on it."""
    from lmlab.models.build import base_fingerprint, build_model
    from lmlab.models.lora import use_fused_lora
    from lmlab.models.quantize import load_dtype, quants
    from lmlab.models.vocabulary import grow_embeddings, use_token_rows
    from lmlab.tokenizers import load_tokenizer, rows_needed

    _check_adapter(path)
    quant = info.get("quant") or {"kind": "none"}
    try:
        quant_config: Any = quants.class_of(quant["kind"]).model_validate(quant)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "the adapter's base is stored in no known way",
            where=str(path / "lmlab.json"),
            fix="use the file as it was saved",
        ) from error
    model = build_model(
        about,
        hf_config,
        seed=0,
        dtype=load_dtype(quant_config, hardware.compute_dtype, mixed=hardware.mixed),
        device=hardware.device,
    )
    expected = info.get("base_fingerprint")
    if expected and base_fingerprint(model) != expected:
        raise UserError(
            "the adapter was trained on another base",
            where=f"{path}, base {about.source}",
            fix="put the base back that it was trained on",
        )
    generation_config = model.generation_config
    tokenizer = load_tokenizer(path)
    grow_embeddings(model, rows_needed(tokenizer), seed=0)  # what they hold comes from the adapter
    store_base(model, quant_config, hardware)
    adapted = _put_on(model, path)
    use_token_rows(adapted)
    use_fused_lora(adapted)
    return adapted, tokenizer, generation_config


FOREIGN = ("megatron_config",)
"""Fields of an adapter_config.json by which PEFT would import a module that the file names."""


def _check_adapter(path: Path) -> None:
    """Refuse what would run code, before anything of it is read.

    Raises:
        UserError: weights in a pickle file alone, a config that is none, or one that names code to import.
    """
    config = read_json(path / "adapter_config.json")
    foreign = [name for name in FOREIGN if config.get(name)]
    if str(config.get("peft_type")) != "LORA" or foreign:
        what = (
            f"names code to import ({foreign[0]})" if foreign else f"is of type {config.get('peft_type')!r}"
        )
        raise UserError(
            f"the adapter {what[:100]}",
            where=str(path / "adapter_config.json"),
            fix="LoRA adapters as lmlab or PEFT save them",
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise UserError(
            "no adapter_model.safetensors",
            where=str(path),
            fix="a pickle file (.bin) is not opened: save it as safetensors",
        )


def _put_on(model: Any, path: Path) -> Any:
    """The adapter of ``path`` on its base, every one of its tensors in a place and every place filled.

    Raises:
        UserError: a damaged file, or tensors that are not those of this base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        adapted = PeftModel.from_pretrained(model, str(path))
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            given = set(file.keys())
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"the adapter cannot be loaded: {detail}", where=str(path), fix="use one made for this base"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if missing := sorted(wanted - given) or sorted(name for name in given - wanted if ".lora_" in name):
        raise UserError(
            f"the adapter does not fit its base: {len(missing)} tensors without a partner, {missing[0]} the first",
            where=str(path),
            fix="use one made for this base",
        )
    return adapted
