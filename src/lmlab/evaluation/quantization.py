"""What storing a model in few bits costs: its weights, its predictions and its size, each kind beside fp32.

Weights, per linear layer: relative Frobenius error ``||W' - W|| / ||W||``, cosine of W' and W as vectors, and the share of
outliers of W: values beyond 6 standard deviations of their own layer (LLM.int8(), arXiv 2208.07339, calls activations of
magnitude 6 and more outliers; a weight has no such scale of its own, so it is measured in its layer's spread).

Predictions, on given texts: perplexity and ``KL(p || p')`` of the next token's distribution p in fp32 and p' over the stored
base, in nats, and how often both have the same likeliest token. All products are made in fp32, so that the storage alone is
measured. Standard errors are those of a ratio of sums over the texts, paired with fp32 on the same texts.

Two models are in memory at once, fp32 and one stored kind, and of the logits one batch at a time: the
reference is computed once per kind, which costs passes and saves the memory of all its logits (`divergence`).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmlab.evaluation.divergence import Document, compare, encode_texts, ratio
from lmlab.journal import versions_of
from lmlab.models.quantize import (
    QuantConfig,
    dense_weight,
    is_dense,
    is_stored,
    linear_storage,
    quants,
    stored_bytes,
)
from lmlab.records import UserError

KINDS = ("fp16", "bf16", "int8", "fp4", "int4", "nf4", "nf4+dq")
"""What is compared unless told otherwise; ``+dq`` is double quantization."""
OUTLIER_SIGMAS = 6.0
DEFINITIONS = {
    "outlier": f"|w| > {OUTLIER_SIGMAS:g} standard deviations of the layer's weights",
    "error": "Frobenius norm of the difference over that of the fp32 weight",
    "kl": "KL(fp32 || kind) of the next token, nats",
}


@dataclass(frozen=True)
class LayerError:
    """One linear layer stored as one kind.

    Attributes:
        relative_error: Frobenius norm of the error over that of the weight.
        cosine: of stored and original weight as vectors.
    """

    layer: str
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class LayerWeights:
    """One linear layer of the original.

    Attributes:
        outlier_share: of its values, those beyond 6 of its standard deviations.
        largest_in_sigmas: its largest magnitude in standard deviations.
    """

    layer: str
    shape: tuple[int, int]
    outlier_share: float
    largest_in_sigmas: float


@dataclass(frozen=True)
class KindFigures:
    """One kind on all texts; differences are to fp32 on the same texts.

    Attributes:
        bits_per_param: of the linear layers without the head, all quantization state counted.
        model_bits_per_param: of the whole model, embeddings and head included.
        quantized_share: parameters of the model that are stored in fewer bits than fp32.
        nll, nll_increase, kl: nats per token.
        nll_increase_error, kl_error: standard errors over the texts, None of a single one.
        same_token: share of positions with the same likeliest token.
        weight_error: relative Frobenius error of all linear layers together.
        nll_per_text: sums, in the order of the texts.
    """

    kind: str
    bits_per_param: float
    model_bits_per_param: float
    base_bytes: int
    quantized_share: float
    weight_error: float
    perplexity: float
    nll: float
    nll_increase: float
    nll_increase_error: float | None
    kl: float
    kl_error: float | None
    same_token: float
    nll_per_text: list[float]


def quantization_report(
    name_or_path: str,
    *,
    texts: Sequence[str],
    kinds: Sequence[str] = KINDS,
    accelerator: str = "auto",
    folder: str | Path,
    max_length: int = 512,
) -> dict[str, Any]:
    """Measure and write ``quantization.md``, ``.json``, ``.csv`` (a row a kind), ``layers.csv`` and three plots.

    Args:
        name_or_path: a model directory, a run's whose model was trained as a whole, a hub id or ``lmlab:tiny-base``.
        texts: each is one sample of the standard errors; longer ones are read in windows.
        kinds: of `KINDS`, or any other registered storage.
        accelerator: as ``trainer.accelerator``.
        folder: made if it is not there.
        max_length: tokens of a window, at most the model's context; every token but a text's first is predicted once.

    Returns:
        What quantization.json holds: ``model``, ``device``, ``versions``, ``texts``, ``tokens``, ``skipped_texts``,
        ``parameters``, ``definitions``, ``kinds``, ``order``, ``weights``, ``layers`` (kind -> rows) and ``files``.

    Raises:
        UserError: an unknown kind, a model that is none, or texts without two tokens.
    """
    from lmlab.evaluation.quantization_pages import write_pages
    from lmlab.models.build import build_model, context_length
    from lmlab.models.hardware import choose_hardware
    from lmlab.tokenizers import load_tokenizer

    chosen = {kind: storage_of(kind) for kind in dict.fromkeys(kinds)}
    about = _pretrained(name_or_path)
    hardware = choose_hardware(accelerator, "fp32")
    hf_config = about.hf_config(None)
    length = min(max_length, context_length(hf_config) or max_length)
    documents, skipped = encode_texts(load_tokenizer(about.source), texts, length)
    reference: Any = build_model(about, hf_config, seed=0, dtype=torch.float32, device=hardware.device)
    reference.requires_grad_(False).eval()
    figures, layers = _side_by_side(reference, chosen, documents)
    found = {
        "model": name_or_path,
        "device": str(hardware.device),
        "versions": versions_of("torch", "transformers", "bitsandbytes"),
        "texts": len(documents),
        "skipped_texts": skipped,
        "tokens": sum(document.predicted for document in documents),
        "window": length,
        "parameters": _parameters(reference),
        "definitions": DEFINITIONS,
        "kinds": [asdict(each) for each in figures],
        "order": order(figures, [document.predicted for document in documents]),
        "weights": [asdict(each) for each in layer_weights(reference)],
        "layers": {kind: [asdict(row) for row in rows] for kind, rows in layers.items()},
    }
    return write_pages(found, Path(folder))


def _side_by_side(
    reference: Any, chosen: Mapping[str, QuantConfig], documents: Sequence[Document]
) -> tuple[list[KindFigures], dict[str, list[LayerError]]]:
    """fp32 and every kind of ``chosen``, one stored copy of ``reference`` in memory at a time."""
    figures, layers = [_of_fp32(reference, documents)], dict[str, list[LayerError]]()
    for kind, quant in chosen.items():
        stored = copy.deepcopy(reference)
        quant.apply(stored, compute_dtype=torch.float32)
        layers[kind], total = layer_errors(reference, stored)
        figures.append(_figures(kind, reference, stored.eval(), documents, weight_error=total))
        del stored
    return figures, layers


def storage_of(kind: str) -> QuantConfig:
    """The config of a kind by its name here (``nf4``, ``nf4+dq``, ...).

    Raises:
        UserError: no such kind.
    """
    name, plus, detail = kind.partition("+")
    known = [each for each in quants.names() if each != "none"]
    four_bit = name in ("nf4", "fp4")
    if name not in known or (plus and not (four_bit and detail == "dq")):
        both = [*known, *(f"{each}+dq" for each in known if each in ("nf4", "fp4"))]
        raise UserError(f"unknown storage '{kind}'", where="kinds", fix=f"one of {', '.join(both)}")
    values = {"kind": name} | ({"double_quant": bool(plus)} if four_bit else {})
    config: Any = quants.class_of(name).model_validate(values)
    return config


def _pretrained(name_or_path: str) -> Any:
    from lmlab.models.build import Pretrained

    return Pretrained(
        kind="pretrained",
        name_or_path=name_or_path,
        revision=None,
        trust_remote_code=False,
        gradient_checkpointing=False,
    )


def layer_errors(reference: Any, stored: Any) -> tuple[list[LayerError], float]:
    """Every linear layer but the head, and the relative error of all of them together."""
    rows, squares, norms = [], 0.0, 0.0
    replaced = dict(stored.named_modules())
    for name, module in _linears(reference):
        weight = dense_weight(module, torch.float32)
        kept = dense_weight(replaced[name], torch.float32)
        sizes = [
            torch.linalg.vector_norm(each, dtype=torch.float64).item()
            for each in (weight, kept, kept - weight)
        ]
        norm, kept_norm, gap = sizes
        product = (weight.double() * kept).sum().item()
        cosine = min(1.0, product / (norm * kept_norm)) if norm * kept_norm else math.nan
        rows.append(LayerError(name, gap / norm if norm else math.nan, cosine))
        squares, norms = squares + gap * gap, norms + norm * norm
    return rows, math.sqrt(squares / norms) if norms else math.nan


def layer_weights(reference: Any) -> list[LayerWeights]:
    """How the weights of every linear layer but the head are spread."""
    rows = []
    for name, module in _linears(reference):
        weight = dense_weight(module, torch.float32)
        sigma = weight.std(correction=0)
        size = weight.abs()
        beyond = (size > OUTLIER_SIGMAS * sigma).double().mean().item()
        largest = (size.max() / sigma).item() if sigma > 0 else math.nan
        rows.append(LayerWeights(name, (weight.shape[0], weight.shape[1]), beyond, largest))
    return rows


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    modules = dict(model.named_modules())
    return (
        (layer.name, modules[layer.name]) for layer in linear_storage(model) if is_dense(modules[layer.name])
    )


def _parameters(reference: Any) -> dict[str, int]:
    return {
        "total": sum(parameter.numel() for parameter in reference.parameters()),
        "linear": sum(math.prod(layer.shape) for layer in linear_storage(reference)),
    }


# --- predictions ------------------------------------------------------------------------------------------------------


def _of_fp32(reference: Any, documents: Sequence[Document]) -> KindFigures:
    return _figures("fp32", reference, reference, documents, weight_error=0.0)


def _figures(
    kind: str, reference: Any, stored: Any, documents: Sequence[Document], *, weight_error: float
) -> KindFigures:
    sums = compare(reference, stored, documents)
    tokens = torch.tensor([document.predicted for document in documents], dtype=torch.float64)
    total = tokens.sum().item()
    storage = linear_storage(stored)
    linear = sum(math.prod(layer.shape) for layer in storage)
    parameters = _parameters(reference)["total"]
    size = stored_bytes(stored)
    increase, increase_error = ratio(sums.nll - sums.reference_nll, tokens)
    kl, kl_error = ratio(sums.kl, tokens)
    nll = sums.nll.sum().item() / total
    return KindFigures(
        kind=kind,
        bits_per_param=sum(layer.bits for layer in storage) / max(1, linear),
        model_bits_per_param=8 * size / parameters,
        base_bytes=size,
        quantized_share=_quantized(stored) / parameters,
        weight_error=weight_error,
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        nll_increase=increase,
        nll_increase_error=increase_error,
        kl=max(0.0, kl),
        kl_error=kl_error,
        same_token=sums.same / total,
        nll_per_text=sums.nll.tolist(),
    )


def _quantized(stored: Any) -> int:
    """Parameters in fewer than 32 bits: packed ones count as what they stand for, a tied one once."""
    packed = {
        id(m.weight): math.prod((m.out_features, m.in_features)) for m in stored.modules() if _is_packed(m)
    }
    floats = {id(p): p.numel() for p in stored.parameters() if p.is_floating_point() and p.element_size() < 4}
    return sum((floats | packed).values())


def _is_packed(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and is_stored(module)


def order(figures: Iterable[KindFigures], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Kinds by perplexity, the best first, each with its distance to the one before on the same texts.

    Each row: ``kind``, ``nll_more`` (nats per token than the one before; None for the first) and its standard error
    ``error``. A distance of less than two of them is no order.
    """
    ranked = sorted(figures, key=lambda each: each.nll)
    weights = torch.tensor(tokens, dtype=torch.float64)
    rows: list[dict[str, Any]] = [{"kind": ranked[0].kind, "nll_more": None, "error": None}]
    for before, after in itertools.pairwise(ranked):
        gap = torch.tensor(after.nll_per_text, dtype=torch.float64) - torch.tensor(
            before.nll_per_text, dtype=torch.float64
        )
        more, error = ratio(gap, weights)
        rows.append({"kind": after.kind, "nll_more": more, "error": error})
    return rows
