"""Invariances of one model in this process: what must be the same number however it is come by.

Each check uses what training, sampling and scripts use: Lightning's step, the data's own collation, the loss head, batched
decoding, the writer of weights and `load_for_use`. Only the comparison is new here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmlab.checks.bench import ROUNDING, Bench
from lmlab.checks.sizes import largest
from lmlab.checks.table import Part, SkippedError, check

if TYPE_CHECKING:
    import torch

    from lmlab.records import Example

NEW_TOKENS = 8
"""Decoded per prompt."""
PROMPTS, PROMPT_TOKENS = 3, 40


@check("accumulation", "micro-batches = one batch")
def accumulation(bench: Bench) -> Iterator[Part]:
    """The gradient of a step of n rows at once, and of the same rows in k micro-batches, as the optimizer sees them.

    Both are steps of the Trainer that divides by the supervised tokens of the whole step; clipping is off, as it would
    hide a wrong scale.
    """
    rows = max(2, bench.config.trainer.batch_size)
    micro = next(size for size in range(rows // 2, 0, -1) if rows % size == 0)
    whole, loss = _step(bench, rows, 1)
    cut, loss_cut = _step(bench, micro, rows // micro)
    yield Part(
        f"loss of {rows} rows and of {rows // micro} x {micro}", _relative(loss, loss_cut), bench.rounding
    )
    yield _gradient_part(
        f"gradient of {rows} rows and of {rows // micro} x {micro}", whole, cut, bench.rounding
    )


def _step(bench: Bench, batch_size: int, accumulate: int) -> tuple[dict[str, torch.Tensor], float]:
    """(gradient, loss in nats per token) of one optimizer step by Lightning; the weights are put back."""
    import torch

    from lmlab.models.memory import MemoryMeter
    from lmlab.training.datamodule import LMDataModule
    from lmlab.training.fit import build_trainer
    from lmlab.training.modules import PretrainModule, SFTModule, Validation

    config, built, hardware = bench.config, bench.built, bench.hardware
    told = {"batch_size": batch_size, "accumulate_grad_batches": accumulate, "gradient_clip_val": None}
    options = config.trainer.model_copy(update={**told, "max_steps": 1, "max_epochs": None})
    module = (PretrainModule if config.task == "pretrain" else SFTModule)(
        built.model,
        loss=config.loss,
        optim=built.optim,
        max_steps=1,
        validation=Validation(supervised_bytes=0),
        meter=MemoryMeter(on_cuda=hardware.device.type == "cuda"),
    )
    trained = [parameter for parameter in built.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    built.model.zero_grad(set_to_none=True)
    trainer = build_trainer(options, hardware, max_steps=1, callbacks=[], root=bench.folder, world_size=1)
    trainer.limit_val_batches = 0
    # Lightning takes a model off its GPU at the end; this one is needed there
    vars(module)["cpu"] = lambda: module
    trainer.fit(module, LMDataModule(bench.prepared, options, seed=config.seed, flat=built.flat))
    gradient = bench.taken_gradients()
    with torch.no_grad():
        for parameter, old in zip(trained, before, strict=True):
            parameter.copy_(old)
    return gradient, module.totals.loss / max(1.0, module.totals.supervised)


@check("packing", "packed = alone, no leak")
def packing(bench: Bench) -> Iterator[Part]:
    """Documents in one flat row against each alone: loss, gradient, and what a changed one does to its neighbours.

    Also where the config does not pack (then its own rows have one document each): the flat row is training's layout for
    every record, and only whether several of its documents lie in one *training row* is the config's choice.
    """
    from lmlab.data.packing import collate_flat, collate_padded
    from lmlab.models.attention import NAME

    model, documents = bench.built.model, bench.documents
    _require_flat(bench, model)
    count = sum(int((document.labels >= 0).sum()) for document in documents)
    loss, gradient = bench.gradient(collate_flat(documents), NAME, count)
    alone_loss, alone = 0.0, dict[str, Any]()
    for document in documents:
        of_one, found = bench.gradient(collate_padded([document]), bench.standard, count)
        alone_loss += of_one
        alone = {name: alone.get(name, 0.0) + value for name, value in found.items()}
    yield Part(f"loss of {len(documents)} documents", _relative(alone_loss, loss), bench.rounding)
    yield _gradient_part(f"gradient of {len(documents)} documents", alone, gradient, bench.rounding)
    yield from _leak(bench, documents)


def _require_flat(bench: Bench, model: Any) -> None:
    from lmlab.models.head import base_model
    from lmlab.models.probe import why_not_flat

    if not bench.built.flat and (reason := why_not_flat(base_model(model).config)) is not None:
        raise SkippedError(f"this model is trained on padded rows of one document each: {reason}")


def _leak(bench: Bench, documents: Sequence[Example]) -> Iterator[Part]:
    """Change a document in the middle of a flat row: the others' logits, at both of their ends, stay bit for bit.

    A few experts round with the number of rows they are given, so rounding is allowed; a leak is a thousand times that.
    """
    import torch

    from lmlab.data.packing import collate_flat
    from lmlab.models.attention import NAME, attention
    from lmlab.models.head import base_model, supervised_logits
    from lmlab.modes import evaluating
    from lmlab.records import Example

    model, middle = bench.built.model, len(documents) // 2
    vocab = base_model(model).config.get_text_config().vocab_size
    old = documents[middle]
    other = Example(
        (old.input_ids + 1 + torch.arange(len(old.input_ids)) % 7) % vocab, old.labels, old.lengths
    )
    ends, mine = [], []
    start = 0
    for index, document in enumerate(documents):
        ends += [start, start + len(document.input_ids) - 1]
        mine += [index == middle] * 2
        start += len(document.input_ids)
    changed = torch.tensor(mine)

    def logits(row: Sequence[Example]) -> torch.Tensor:
        batch = dataclasses.replace(collate_flat(row), supervised_index=torch.tensor(ends))
        with torch.no_grad(), evaluating(model), attention(model, NAME), bench.hardware.computing():
            return supervised_logits(model, batch.to(bench.hardware.device)).logits.cpu()

    before = logits(documents)
    after = logits([*documents[:middle], other, *documents[middle + 1 :]])
    size = float(before.abs().max())
    seen = float((after - before)[changed].abs().max()) / size
    yield Part(
        "a changed document's own logits", 0.0 if seen > bench.rounding else math.inf, detail="they stay"
    )
    leaked = float((after - before)[~changed].abs().max()) / size
    yield Part("the other documents' logits when one changes", leaked, bench.rounding / 10)


@check("lora_init", "fresh adapter = base")
def lora_init(bench: Bench) -> Iterator[Part]:
    """Logits of the base just before the adapter is put on it, and with the adapter before any step: B is zero.

    The fused layer makes the same product by another call, so the last bits may differ where there is a bias.
    """
    if not bench.config.adapter.freezes_base:
        raise SkippedError(f"adapter={bench.config.adapter.kind} trains the base itself")
    start = bench.at_start
    yield _logits_part("logits at the start", start.base, start.adapted, bench.rounding / 10)


@check("cache", "cached = uncached decoding")
def cache(bench: Bench) -> Iterator[Part]:
    """Greedy decoding by the key-value cache against one full forward pass, and prompts together against each alone.

    The decode runs as samples do, with adapters merged for its time; the full pass is training's model as it is.
    """
    import torch

    from lmlab.checks.decoding import Watched
    from lmlab.records import Example

    model, prompts = bench.built.model, _prompts(bench)
    decode = Watched(bench, prompts, new_tokens=NEW_TOKENS)
    alone = [decode([prompt], ends=()) for prompt in prompts]
    full, worst, margin = [], 0.0, 0.0
    for prompt, (found, seen) in zip(prompts, alone, strict=True):
        ids = torch.tensor([*prompt, *found[0]])[:-1]
        at = torch.arange(len(prompt) - 1, len(ids))
        logits = bench.own_logits(model, Example(ids, ids, (len(ids),)), at).cpu()
        full.append(logits)
        gap = _apart(logits, torch.cat([each for _, each in seen])[: len(logits)])
        worst = largest((worst, gap))
        margin = largest((margin, _worse_than_best(logits, found[0])))
    yield Part("logits with the cache and without", worst, bench.rounding)
    yield Part(
        "greedy tokens with the cache and without", margin, bench.rounding, "another token is the best"
    )
    yield from decode.together_against_alone(alone, full)


def _prompts(bench: Bench) -> list[list[int]]:
    """Prompts as the sample grid's, of different lengths."""
    from lmlab.assemble import sample_prompts
    from lmlab.generation.decode import context_length

    config = bench.config.model_copy(
        update={"samples": bench.config.samples.model_copy(update={"prompts": PROMPTS})}
    )
    texts = [full for _, full in sample_prompts(config, bench.prepared, bench.built)]
    ids = [bench.built.generator.encode(text) for text in texts]
    ids += [document.input_ids.tolist() for document in bench.documents][: PROMPTS - len(ids)]
    limit = context_length(bench.built.model)
    longest = PROMPT_TOKENS if limit is None else max(1, min(PROMPT_TOKENS, limit - NEW_TOKENS))
    return [prompt[-max(1, longest - 5 * index) :] for index, prompt in enumerate(ids)]


def _worse_than_best(logits: torch.Tensor, tokens: Sequence[int]) -> float:
    """By how much of the logits' size a chosen token is below the best, at worst; 0.0 where each is the best."""
    chosen = logits[range(len(tokens)), list(tokens)]
    return float((logits.max(-1).values - chosen).max() / logits.abs().max())


@check("save_load", "loaded = saved")
def save_load(bench: Bench) -> Iterator[Part]:
    """Weights as a run saves them, brought back as scripts do: the same tensors bit for bit, and the same logits.

    The logits may round otherwise: layers that are fused for training are plain ones in a script.
    """
    import torch

    from lmlab.load import load_for_use

    built = bench.built
    folder = bench.folder / "saved"
    built.save_weights(folder, None)
    usable = load_for_use(str(folder), accelerator="gpu" if bench.hardware.device.type == "cuda" else "cpu")
    loaded = usable.model
    theirs = dict(loaded.named_parameters())
    worst, name_of_worst = 0.0, ""
    for name, parameter in built.model.named_parameters():
        if not parameter.requires_grad:
            continue
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            gap = math.inf
        else:
            gap = largest([float((parameter.detach().double() - other.detach().double()).abs().max())])
        if gap > worst:
            worst, name_of_worst = gap, name
    yield Part("trained tensors", worst, detail=name_of_worst)
    with torch.no_grad():
        ours = [bench.own_logits(built.model, document) for document in bench.documents]
        others = [bench.own_logits(loaded, document) for document in bench.documents]
    allowed, detail = bench.rounding, ""
    if usable.hardware.precision != bench.hardware.precision:  # a script has no trainer.precision to go by
        allowed = max(allowed, ROUNDING[usable.hardware.precision])
        detail = f"trained in {bench.hardware.precision} products, loaded for {usable.hardware.precision}"
    yield _logits_part("logits", ours, others, allowed, detail)


# --- sizes of differences -----------------------------------------------------------------------------------------


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    gap = (one.double() - other.double().to(one.device)).abs().max()
    return float(gap / one.double().abs().max().clamp(min=1e-30))


def _logits_part(
    what: str, one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], allowed: float, detail: str = ""
) -> Part:
    return Part(what, largest(_apart(a, b) for a, b in zip(one, other, strict=True)), allowed, detail)


def _gradient_part(
    what: str, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], allowed: float
) -> Part:
    """Distance of two gradients over all parameters together, relative to the first."""
    if one.keys() != other.keys():
        return Part(what, math.inf, allowed, f"of {len(one)} and of {len(other)} parameters")
    gap = sum(float((one[name] - other[name]).square().sum()) for name in one)
    size = sum(float(value.square().sum()) for value in one.values())
    furthest = max(one, key=lambda name: float((one[name] - other[name]).abs().max()))
    return Part(what, math.sqrt(gap / size) if size else math.inf, allowed, f"most of it in {furthest}")
