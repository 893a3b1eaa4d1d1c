"""Evaluation of models, and of several forms of each, on the same data: one form after another is loaded, measured, freed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmlab.measured import DataChoice, DataSets, Measured, own_side
from lmlab.records import UserError
from lmlab.variants import Variant

if TYPE_CHECKING:
    from lmlab.evaluation.answers import Answers
    from lmlab.generation.samplers import SamplerConfig
    from lmlab.load import UsableModel


@dataclass(frozen=True)
class Suites:
    """Tasks of the lm-evaluation-harness, as `lmlab.evaluation.harness.load_suites` gives them; ``limit`` documents of each."""

    tasks: dict[str, Any]
    limit: int | None = None


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        stride: tokens between overlapping windows of a text; None for windows that do not overlap.
        batch_size: rows in one forward pass.
        sampler: name in conf/sampler or ``further_samplers``; None for the run's own, or greedy.
        sampler_settings: single fields of it.
        further_samplers: those in the configs of the runs, see `lmlab.plugged.samplers_of`.
        answers: generated per data set, for its first questions; None for all, 0 for none.
        seed: of the first answer; the next has one more.
    """

    data: tuple[DataChoice, ...] = ()
    limit: int | None = None
    stride: int | None = None
    batch_size: int = 16
    sampler: str | None = None
    sampler_settings: tuple[tuple[str, Any], ...] = ()
    further_samplers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    answers: int | None = 200
    seed: int = 0
    suites: Suites | None = None
    accelerator: str = "auto"
    use_best: bool = False


@dataclass
class Result:
    """Figures of one form.

    Attributes:
        data: by data set: loss, perplexity, bits_per_byte, exact_match, rouge1, ...
        suites: by task: metric -> value.
        cost: base_bytes, bits_per_param, peak_gb.
        texts: by data set, the generated answers.
        notes: by data set, what a person should know.
    """

    model: str
    form: str
    data: dict[str, dict[str, Any]]
    suites: dict[str, dict[str, float]]
    cost: dict[str, float]
    texts: dict[str, list[dict[str, Any]]]
    notes: dict[str, list[str]]

    def row(self) -> dict[str, Any]:
        """As plain JSON values, without the texts."""
        names = ("model", "form", "data", "suites", "cost", "notes")
        return {name: getattr(self, name) for name in names}


def evaluate(
    variants: Sequence[Variant], asked: Asked, *, say: Callable[[str], None] = lambda text: None
) -> list[Result]:
    """Measure each form in turn.

    Args:
        say: told what is going on.

    Raises:
        UserError: what cannot be loaded, read or measured.
    """
    _check_own_sides(variants, asked)
    _import_ahead(variants)
    data = DataSets(asked.limit)
    try:
        return [_one(variant, asked, data, say) for variant in variants]
    finally:
        data.close()


def chosen_sampler(
    name: str | None,
    settings: Sequence[tuple[str, Any]],
    own: dict[str, Any],
    *,
    also: Mapping[str, Mapping[str, Any]] | None = None,
) -> SamplerConfig:
    """The named sampler (of conf/sampler, else one of ``also``), or the run's ``own`` (greedy where there is none), with single fields changed.

    Raises:
        UserError: an unknown name, or a field it does not have.
    """
    from lmlab.config.named import named_sampler, sampler_names
    from lmlab.generation.samplers import load_sampler

    if name is not None or not own:
        return named_sampler(name or "greedy", dict(settings), also=also)
    if own.get("kind") in sampler_names():  # what an older run's sampler did not have yet comes from its YAML
        return named_sampler(own["kind"], {**own, **dict(settings)})
    return load_sampler({**own, **dict(settings)})


def _check_own_sides(variants: Sequence[Variant], asked: Asked) -> None:
    """Before anything is loaded: every model that is asked for its own held-out records has them."""
    for choice in asked.data:
        if choice.config is not None:
            continue
        if asked.limit is not None:
            raise UserError(
                f"--limit with --data {choice.given}: a run's own side is measured whole",
                where="--limit",
                fix="leave it out, or name the data set or the file",
            )
        for variant in variants:
            own_side(choice.given, variant.model)


def _import_ahead(variants: Sequence[Variant]) -> None:
    """What all forms need, so that on a CPU no form's memory has the libraries of all others in it."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if any(variant.quant not in (None, "none", "fp16", "bf16") for variant in variants):
        import bitsandbytes  # noqa: F401


def _one(variant: Variant, asked: Asked, data: DataSets, say: Callable[[str], None]) -> Result:
    import torch

    from lmlab.models.memory import MemoryMeter, release_free_memory

    on_cuda = asked.accelerator != "cpu" and torch.cuda.is_available()
    meter = MemoryMeter(on_cuda=on_cuda)
    gc.collect()
    release_free_memory()
    before = 0.0 if on_cuda else meter.read()["memory/rss_gb"]
    meter.start("evaluate")
    say(f"{variant.model}: {variant.name}")
    with variant.opened(accelerator=asked.accelerator, use_best=asked.use_best) as usable:
        result = Result(variant.model, variant.name, {}, {}, _storage(usable.model), {}, {})
        for choice in asked.data:
            measured = data.get(choice, usable, variant.model)
            figures, answers = _on_data(usable, measured, asked)
            result.data[measured.name] = figures
            result.notes[measured.name] = [*measured.notes, *_windows(measured, asked, figures, answers)]
            if answers is not None:
                result.texts[measured.name] = answers.rows
        if asked.suites is not None:
            from lmlab.evaluation.harness import run_suites

            result.suites = run_suites(
                usable.model,
                usable.tokenizer,
                asked.suites.tasks,
                limit=asked.suites.limit,
                batch_size=asked.batch_size,
                around=usable.generator.around,
            )
    meter.start(None)
    result.cost["peak_gb"] = max(0.0, meter.read()["memory/evaluate/peak_gb"] - before)
    del usable
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    return result


def _on_data(usable: UsableModel, measured: Measured, asked: Asked) -> tuple[dict[str, Any], Answers | None]:
    from lmlab.evaluation.answers import answer
    from lmlab.evaluation.likelihood import likelihood, rows_to_score
    from lmlab.models.attention import NAME, attention
    from lmlab.models.probe import require_flat

    meta = measured.prepared.meta
    is_text = meta["stream"]
    flat = is_text and meta["apart"]
    if flat:
        require_flat(usable.model.config, "data.cross_document_attention")
    rows = rows_to_score(measured.prepared, stride=asked.stride if is_text else None, side=measured.side)
    standard = str(usable.model.config._attn_implementation)
    with attention(usable.model, NAME if flat else standard), usable.hardware.computing():
        found = likelihood(
            usable.model,
            rows,
            num_bytes=measured.counts["supervised_bytes"],
            batch_size=asked.batch_size,
            device=usable.hardware.device,
            flat=flat,
        )
    figures: dict[str, Any] = found.figures()
    if measured.held_out:
        figures["held_out"] = measured.held_out
    questions = measured.questions[: asked.answers]
    if not questions:
        return figures, None
    sampler = chosen_sampler(
        asked.sampler, asked.sampler_settings, usable.sampler, also=asked.further_samplers
    )
    answers = answer(usable.generator, questions, sampler=sampler, seed=asked.seed)
    return {**figures, **answers.figures(), "sampler": sampler.model_dump(mode="json")}, answers


def _windows(measured: Measured, asked: Asked, figures: dict[str, Any], answers: Answers | None) -> list[str]:
    """How it was read, in words."""
    meta = measured.prepared.meta
    length = meta["max_length"]
    if not meta["stream"]:
        said = f"{figures['tokens']:,} response tokens scored, each record on its own"
        said += "; --stride changes nothing here" if asked.stride is not None else ""
    elif asked.stride is None:
        said = f"{figures['tokens']:,} tokens scored in windows of {length}"
    else:
        seen = length - asked.stride
        said = f"{figures['tokens']:,} tokens scored once in windows of {length} every {asked.stride}: at least {seen} before each"
    lines = [said]
    if answers is not None:
        whole = len(measured.questions)
        part = "" if len(answers.rows) == whole else f" (the first of {whole:,}; --answers)"
        lines.append(f"{len(answers.rows):,} answers by sampler {figures['sampler']['kind']}{part}")
    return lines


def _storage(model: Any) -> dict[str, float]:
    """What the base takes, adapters not counted."""
    from lmlab.models.quantize import linear_storage, stored_bytes

    added = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if _is_added(name)
    )
    layers = [layer for layer in linear_storage(model) if not _is_added(layer.name)]
    parameters = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return {
        "base_bytes": stored_bytes(model) - added,
        "bits_per_param": sum(layer.bits for layer in layers) / max(1, parameters),
    }


def _is_added(name: str) -> bool:
    """Whether PEFT put the parameter or layer of this name beside the base."""
    return any(mark in name for mark in ("lora_", "modules_to_save", "token_adapter", "trainable_tokens"))
