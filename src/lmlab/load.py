"""Trained weights brought back for scripts: a run, adapters over their base, a model directory or a hub model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.assemble import prompting_of, store_base, text_generator
from lmlab.data.formats import Prompting
from lmlab.journal import read_json
from lmlab.models.adapter_base import AdapterDirectory, refuse_other_names
from lmlab.plugged import load_plugins_of
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.generation.text import TextGenerator
    from lmlab.models.build import Pretrained
    from lmlab.models.combine import CombinationMethod, Combined
    from lmlab.models.hardware import Hardware
    from lmlab.models.quantize import QuantConfig


FIRST = "default"
"""Name of the adapter that a run or an adapter's directory stands for, PEFT's own."""


@dataclass(frozen=True)
class UsableModel:
    """A trained model for scripts.

    Attributes:
        prompting: from a question to the prompt as it was trained.
        sampler: the sampler of its run, as plain values; {} if it has none.
        model: transformers' model, in PEFT's around it where there are adapters; in eval mode.
        info: its lmlab.json, {} for weights of others.
        source: the base's hub id or absolute path (without adapters: the model's own).
        quant: how the base is stored.
        adapter_names: of the adapters on it, the first in force until `using` says otherwise (it is called
            ``default`` where ``name_or_path`` was its directory); () without.
    """

    generator: TextGenerator
    prompting: Prompting
    sampler: dict[str, Any]
    model: Any
    tokenizer: Any
    hardware: Hardware
    info: dict[str, Any]
    source: str
    quant: QuantConfig
    adapter_names: tuple[str, ...] = ()
    _of: Mapping[str, UsableModel] = field(default_factory=dict, repr=False)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[UsableModel]:
        """Compute with one adapter, or with None as the bare base; afterwards as before.

        Yields:
            The model as that adapter was trained: its own tokenizer, prompting, sampler and marks that end a text.
            With None these stay the first adapter's, so that base and adapter answer the same prompt.

        Raises:
            UserError: no adapter of that name.
        """
        from lmlab.models.adapter_files import using_adapter

        with using_adapter(self.model, adapter):
            yield self if adapter is None else self._of.get(adapter, self)


def load_for_use(
    name_or_path: str,
    *,
    accelerator: str = "auto",
    use_best: bool = False,
    adapters: Mapping[str, str] | None = None,
    quant: QuantConfig | None = None,
) -> UsableModel:
    """Load a run directory, an adapter, a model directory or a hub model.

    Args:
        name_or_path: a run's directory stands for its ``adapter/`` or ``model/``.
        use_best: of a run, the weights with the best validation loss instead of the last.
        adapters: further adapters on the same base, name -> run or adapter directory; `UsableModel.using` switches.
            Over a model without an adapter they are all there are, and that model is their base.
        quant: how to store the base; None: as the adapter was trained on it, and a plain model as it is.

    Raises:
        UserError: nothing usable there, or an adapter whose base is gone, is another one, or is stored differently.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = weights_folder(Path(name_or_path), use_best=use_best)
    if path is not None:
        load_plugins_of(path)
    further = {
        name: AdapterDirectory.of(_adapter_folder(given, use_best))
        for name, given in (adapters or {}).items()
    }
    if path is not None and (path / "adapter_config.json").is_file():
        if FIRST in further:
            raise UserError(
                f"two adapters named '{FIRST}'", where="adapters", fix="name the further ones otherwise"
            )
        return _adapted({FIRST: AdapterDirectory.of(path), **further}, accelerator, quant)
    source = str(path or name_or_path)
    if further:
        return _adapted(further, accelerator, quant, base=source)
    return _plain(source, path, accelerator, quant)


def weights_folder(path: Path, *, use_best: bool) -> Path | None:
    """The folder with weights that ``path`` means, None if it is not a local directory.

    Raises:
        UserError: the best weights are asked for of what has none: it would be others that are used.
    """
    root = path / "best" if use_best else path
    for name in ("adapter", "model"):
        if (root / name).is_dir():
            return root / name
    if use_best:
        fix = "leave --best out (use_best), or name a run that has a folder best"
        raise UserError("there are no best weights", where=str(path), fix=fix)
    return path if path.is_dir() else None


def combine_and_save(
    adapters: Mapping[str, tuple[str, float]],
    to: str | Path,
    *,
    method: CombinationMethod = "cat",
    rank: int | None = None,
    use_best: bool = False,
    quant: QuantConfig | None = None,
) -> Combined:
    """One adapter whose update is the weighted sum of several, as a PEFT directory with its lmlab.json.

    Args:
        adapters: name -> (run or adapter directory, weight); all on the same base. A weight may be negative.
        to: the new directory; it must not hold anything yet.
        method: see `lmlab.models.combine.combine_adapters`.
        rank: of the result, for ``svd`` alone.
        quant: how the base is to be stored under the result; None: as under all of them.

    Returns:
        The rank and how far the result's update is from the exact sum.

    Raises:
        UserError: as `load_for_use` and `combine_adapters`; ``to`` is taken or cannot be written; or they were
            trained with different templates.
    """
    from lmlab.models import combine
    from lmlab.models.adapter_files import save_adapter
    from lmlab.models.quantize import Unquantized

    target = Path(to)
    combine.check_target(target)
    if len(adapters) < 2:
        raise UserError(
            "nothing to combine", where="adapters", fix="give at least two, as a=DIR:0.5,b=DIR:0.5"
        )
    weights = {name: weight for name, (_, weight) in adapters.items()}
    combine.check_combination(weights, method, rank)
    named = {
        name: AdapterDirectory.of(_adapter_folder(path, use_best)) for name, (path, _) in adapters.items()
    }
    combine.check_templates({name: each.info for name, each in named.items()})
    storage = quant or _common_storage(named)
    usable = _adapted(named, "cpu", Unquantized(kind="none"))
    _refuse_other_vocabularies(usable, named)
    combined = combine.combine_adapters(usable.model, weights, name=COMBINED, method=method, rank=rank)
    made_of = {name: {"path": str(named[name].path), "weight": weights[name]} for name in named}
    info = {
        **usable.info,
        "quant": storage.model_dump(mode="json"),
        "run": None,
        "combined": {"method": method, "adapters": made_of, "relative_error": combined.relative_error},
    }
    try:
        save_adapter(usable.model, COMBINED, usable.tokenizer, target, base=usable.source, info=info)
    except OSError as error:
        raise combine.unwritable(target, error.strerror or str(error)) from error
    return combined


COMBINED = "lmlab_combined"
"""Name of a combination while it is made; a saved adapter has none."""


def _adapter_folder(given: str, use_best: bool) -> Path:
    path = weights_folder(Path(given), use_best=use_best)
    if path is None or not (path / "adapter_config.json").is_file():
        raise UserError(
            "no adapter there", where=given, fix="name a run or a directory with adapter_config.json"
        )
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


def _plain(source: str, path: Path | None, accelerator: str, quant: QuantConfig | None) -> UsableModel:
    """A model without adapters, in fp32 or stored as ``quant``."""
    from lmlab.models.build import build_model
    from lmlab.models.quantize import Unquantized, load_dtype
    from lmlab.tokenizers import load_tokenizer

    info = read_json(path / "lmlab.json") if path is not None else {}
    about = _stored_model(source)
    hf_config = about.hf_config(None)
    storage = quant or Unquantized(kind="none")
    hardware = _hardware(accelerator, storage, hf_config)
    dtype = load_dtype(storage, hardware.compute_dtype, mixed=hardware.mixed)
    model = build_model(about, hf_config, seed=0, dtype=dtype, device=hardware.device)
    model.requires_grad_(False)
    store_base(model, storage, hardware)
    tokenizer = load_tokenizer(about.source)
    return _usable(model, tokenizer, hardware, model.generation_config, info, about.source, storage)


def _hardware(accelerator: str, storage: QuantConfig, hf_config: Any) -> Hardware:
    from lmlab.models.build import hidden_size
    from lmlab.models.hardware import choose_hardware

    return choose_hardware(
        accelerator, "auto", frozen_storage=storage.kind, hidden_size=lambda: hidden_size(hf_config)
    )


def _usable(
    model: Any,
    tokenizer: Any,
    hardware: Hardware,
    generation_config: Any,
    info: dict[str, Any],
    source: str,
    storage: QuantConfig,
) -> UsableModel:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prompting = prompting_of(info, tokenizer)
    attn = base.config._attn_implementation
    generator = text_generator(model.eval(), tokenizer, hardware, generation_config, attn, prompting)
    sampler = info.get("sampler") or {}
    return UsableModel(generator, prompting, sampler, model, tokenizer, hardware, info, source, storage)


# --- adapters over their base ----------------------------------------------------------------------------------------


def _adapted(
    named: Mapping[str, AdapterDirectory],
    accelerator: str,
    quant: QuantConfig | None,
    *,
    base: str | None = None,
) -> UsableModel:
    """The base with all adapters on it, the first of them active; every one checked against this base."""
    from lmlab.models.adapter_files import put_on
    from lmlab.models.build import base_fingerprint, build_model
    from lmlab.models.quantize import load_dtype
    from lmlab.models.vocabulary import grow_embeddings

    first = next(iter(named.values()))
    storage = quant or _common_storage(named)
    about = _stored_model(*((base, None) if base else first.base()))
    refuse_other_names(named, about.source)
    hf_config = about.hf_config(None)
    hardware = _hardware(accelerator, storage, hf_config)
    tokenizers = {name: _tokenizer_of(each, about.source, about.revision) for name, each in named.items()}
    rows = _rows_for(tokenizers, hf_config.get_text_config().vocab_size)
    dtype = load_dtype(storage, hardware.compute_dtype, mixed=hardware.mixed)
    model: Any = build_model(about, hf_config, seed=0, dtype=dtype, device=hardware.device)
    found = base_fingerprint(model)
    for each in named.values():
        expected = each.info.get("base_fingerprint")
        if expected and expected != found:
            raise UserError(
                "the adapter was trained on another base",
                where=f"{each.path}, base {about.source}",
                fix="put the base back that it was trained on",
            )
    generation_config = model.generation_config
    grow_embeddings(model, rows, seed=0)  # what they hold comes from the adapter
    store_base(model, storage, hardware)
    for name, each in named.items():
        model = put_on(model, each.path, name=name, alone=len(named) == 1)
    of = {
        name: _usable(model, tokenizers[name], hardware, generation_config, each.info, about.source, storage)
        for name, each in named.items()
    }
    views = {name: replace(usable, adapter_names=tuple(named), _of=of) for name, usable in of.items()}
    of.update(views)  # a view switches as well
    return next(iter(views.values()))


def _storage_of(adapter: AdapterDirectory) -> QuantConfig:
    """How the base lay under the adapter in training."""
    from lmlab.models.quantize import quants

    values = adapter.info.get("quant") or {"kind": "none"}
    try:
        return quants.class_of(values["kind"]).model_validate(values)  # type: ignore[return-value]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            "the adapter's base is stored in no known way",
            where=str(adapter.path / "lmlab.json"),
            fix="use the file as it was saved",
        ) from error


def _common_storage(named: Mapping[str, AdapterDirectory]) -> QuantConfig:
    """The one way that the base lay under all adapters; one that does not say so takes any."""
    found = {name: _storage_of(each) for name, each in named.items() if each.info.get("quant")}
    storages = list(found.values())
    if any(storage != storages[0] for storage in storages):
        told = ", ".join(f"{name}: {storage.kind}" for name, storage in found.items())
        raise UserError(
            f"the adapters were trained over bases that are stored differently ({told})",
            where="adapters",
            fix="say how to store the base (quant), or load them one at a time",
        )
    return storages[0] if storages else _storage_of(next(iter(named.values())))


def _tokenizer_of(adapter: AdapterDirectory, base: str, revision: str | None = None) -> Any:
    """The adapter's own, or its base's where PEFT alone wrote the directory."""
    from lmlab.tokenizers import load_tokenizer

    own = any((adapter.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if own or adapter.info:
        return load_tokenizer(adapter.path)
    return load_tokenizer(base, revision=revision)


def _rows_for(tokenizers: Mapping[str, Any], base_rows: int) -> int:
    """Embedding rows that all adapters need.

    Raises:
        UserError: only some of them add tokens: the others would write tokens that their tokenizers do not know.
    """
    from lmlab.tokenizers import rows_needed

    needed = {name: rows_needed(tokenizer) for name, tokenizer in tokenizers.items()}
    if max(needed.values()) > base_rows and len(set(needed.values())) > 1:
        told = ", ".join(f"{name}: {max(0, rows - base_rows)}" for name, rows in needed.items())
        raise UserError(
            f"the adapters add different numbers of tokens to their base ({told})",
            where="adapters",
            fix="load them one at a time",
        )
    return max(needed.values())


def _refuse_other_vocabularies(usable: UsableModel, named: Mapping[str, AdapterDirectory]) -> None:
    for name, each in named.items():
        own = _tokenizer_of(each, usable.source).get_vocab()
        if own != usable.tokenizer.get_vocab():
            raise UserError(
                f"adapter '{name}' has another vocabulary than '{next(iter(named))}'",
                where=str(each.path),
                fix="combine adapters with the same added tokens",
            )
