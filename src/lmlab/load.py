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
    from peft import PeftModel

    from lmlab.models.build import base_fingerprint, build_model
    from lmlab.models.lora import use_fused_lora
    from lmlab.models.quantize import load_dtype, quants
    from lmlab.models.vocabulary import grow_embeddings, use_token_rows
    from lmlab.tokenizers import load_tokenizer, rows_needed

    quant = info.get("quant") or {"kind": "none"}
    quant_config: Any = quants.class_of(quant["kind"]).model_validate(quant)
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
    adapted = PeftModel.from_pretrained(model, path)
    use_token_rows(adapted)
    use_fused_lora(adapted)
    return adapted, tokenizer, generation_config
