"""One trained model in several forms, each opened as a usable model: its base alone, merged, or stored otherwise.

A form is written as words joined by ``+``: ``base`` (without the adapter), ``adapter`` (with it, as trained), ``merged``
(folded into plain weights), and the name of a storage (conf/quant: ``none``, ``bf16``, ``int8``, ``nf4``, ...), in which the
base is stored anew from its full weights. ``nf4`` is the adapter over a base in nf4, ``base+nf4`` that base alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lmlab.config.compose import CONF
from lmlab.records import UserError
from lmlab.registry import suggest

if TYPE_CHECKING:
    from lmlab.load import UsableModel

WEIGHTS = ("adapter", "base", "merged")


@dataclass(frozen=True)
class Variant:
    """A form of a model.

    Attributes:
        model: a run, an adapter, a model directory or a hub id.
        weights: one of `WEIGHTS`; None for what is there.
        quant: name of a storage; None for that of its training.
    """

    model: str
    weights: str | None = None
    quant: str | None = None

    @classmethod
    def parse(cls, model: str, words: str) -> Variant:
        """From ``base``, ``nf4``, ``base+nf4``, ...

        Raises:
            UserError: an unknown word, two of one sort, or a merge into a storage that it would undo.
        """
        storages = sorted(file.stem for file in (CONF / "quant").glob("*.yaml"))
        weights = quant = None
        for word in words.split("+"):
            if word in WEIGHTS and weights is None:
                weights = word
            elif word in storages and quant is None:
                quant = word
            else:
                fix = suggest(word, [*WEIGHTS, *storages]) + ", or base+QUANT"
                raise UserError(f"unknown form '{words}'", where="--compare", fix=fix)
        return cls(model, weights, quant)

    @property
    def name(self) -> str:
        """The words again; ``as trained`` for none."""
        return "+".join(word for word in (self.weights, self.quant) if word) or "as trained"

    @contextmanager
    def opened(self, *, accelerator: str = "auto", use_best: bool = False) -> Iterator[UsableModel]:
        """Load it, with a generator that writes with this form.

        Raises:
            UserError: no such model, or a form that needs an adapter of a model without one.
        """
        from lmlab.load import load_for_use

        quant = None if self.quant is None else _quant_config(self.quant)
        usable = load_for_use(self.model, accelerator=accelerator, use_best=use_best, quant=quant)
        if self.weights in ("adapter", "merged") and not usable.adapter_names:
            raise UserError(
                f"{self.weights} of a model without an adapter",
                where=f"--compare, {self.model}",
                fix="leave it out, or give a run with adapter=lora or qlora",
            )
        if self.weights == "base" and usable.adapter_names:
            with usable.using(None):
                yield usable
        elif self.weights == "merged":
            yield _merged(usable)
        else:
            yield usable


def _quant_config(name: str) -> Any:
    from lmlab.models.quantize import quants

    values = yaml.safe_load((CONF / "quant" / f"{name}.yaml").read_text(encoding="utf-8"))
    return quants.class_of(values["kind"]).model_validate(values)


def _merged(usable: UsableModel) -> UsableModel:
    from lmlab.assemble import text_generator
    from lmlab.models.merge import merged

    model = merged(usable.model).to(usable.hardware.device).eval()  # type: ignore[arg-type]
    attn = str(model.config._attn_implementation)
    arguments = (usable.tokenizer, usable.hardware, model.generation_config, attn, usable.prompting)
    generator = text_generator(model, *arguments)
    return replace(usable, model=model, generator=generator, adapter_names=())


def run_folder(model: str) -> Path | None:
    """The run's directory where ``model`` is one, or its weights inside it."""
    path = Path(model)
    around = (path, path.parent, path.parent.parent) if path.is_dir() else ()
    return next((folder for folder in around if (folder / "config.yaml").is_file()), None)
