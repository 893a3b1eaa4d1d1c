"""The quantization report against figures computed another way, its files, and what it refuses before it loads anything."""

from __future__ import annotations

import csv
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmlab.evaluation import divergence
from lmlab.evaluation.divergence import Document, compare, encode_texts, ratio
from lmlab.evaluation.quantization import layer_errors, layer_weights, quantization_report, storage_of
from lmlab.evaluation.quantization_pages import _draw_kl, _save
from lmlab.models.build import ASSETS, EMBEDDED, Pretrained, build_model
from lmlab.records import UserError
from lmlab.tokenizers import load_tokenizer

TEXTS = [
    "This module provides access to the mathematical functions defined by the C standard. " * 3,
    "Return the sum of a 'start' value (default: 0) plus an iterable of numbers.",
    "The quick brown fox jumps over the lazy dog and then goes home.",
]
KINDS_HERE = ("fp16", "int8", "nf4", "nf4+dq")


def tiny() -> Any:
    about = Pretrained(
        kind="pretrained",
        name_or_path=EMBEDDED,
        revision=None,
        trust_remote_code=False,
        gradient_checkpointing=False,
    )
    return build_model(about, about.hf_config(None), seed=0, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    return quantization_report(
        EMBEDDED, texts=[*TEXTS, ""], kinds=KINDS_HERE, accelerator="cpu", folder=folder, max_length=64
    )


def by_kind(report: dict[str, Any]) -> dict[str, Any]:
    return {row["kind"]: row for row in report["kinds"]}


def test_against_transformers_loss_and_torch_kl(report: dict[str, Any]) -> None:
    """The shorter texts, each in one window, from the models' own logits in one piece."""
    tokenizer, reference, stored = load_tokenizer(str(ASSETS / "tiny-base")), tiny(), tiny()
    storage_of("nf4").apply(stored.requires_grad_(False), compute_dtype=torch.float32)
    documents, _ = encode_texts(tokenizer, TEXTS[1:], 64)
    nll, kl, tokens = [], 0.0, 0
    for document in documents:
        (ids,) = document.windows
        with torch.no_grad():
            out = [model(input_ids=ids[None], labels=ids[None]) for model in (reference, stored)]
        tokens += len(ids) - 1
        nll.append(out[1].loss.item() * (len(ids) - 1))
        logs = [each.logits[0, :-1].double().log_softmax(-1) for each in out]
        kl += F.kl_div(logs[1], logs[0], log_target=True, reduction="sum").item()
    found = compare(reference, stored, documents)
    assert found.nll.tolist() == pytest.approx(nll, rel=1e-5)
    assert found.kl.sum().item() == pytest.approx(kl, rel=1e-5)
    assert by_kind(report)["nf4"]["nll_per_text"][1:] == pytest.approx(nll, rel=1e-5)


def test_every_token_but_a_texts_first_is_predicted_once() -> None:
    tokenizer = load_tokenizer(str(ASSETS / "tiny-base"))
    (whole,) = encode_texts(tokenizer, TEXTS[:1], 512)[0][0].windows
    (document,), skipped = encode_texts(tokenizer, TEXTS[:1], 16)
    assert skipped == 0
    assert all(len(window) <= 17 for window in document.windows)
    assert torch.equal(torch.cat([window[1:] for window in document.windows]), whole[1:])
    assert document.predicted == len(whole) - 1


def test_nothing_changes_with_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, stored = tiny(), tiny()
    storage_of("nf4").apply(stored.requires_grad_(False), compute_dtype=torch.float32)
    documents = [Document([torch.arange(5, 5 + n)]) for n in (30, 7, 19)]
    together = compare(reference, stored, documents)
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(divergence, "POSITIONS_AT_ONCE", 4)
    alone = compare(reference, stored, documents)
    assert together.nll.tolist() == pytest.approx(alone.nll.tolist(), rel=1e-5)
    assert together.kl.tolist() == pytest.approx(alone.kl.tolist(), rel=1e-4)
    assert together.same == alone.same


def test_the_figures_of_a_kind(report: dict[str, Any]) -> None:
    kinds = by_kind(report)
    assert list(kinds) == ["fp32", *KINDS_HERE]
    assert (report["texts"], report["skipped_texts"]) == (3, 1)
    fp32 = kinds["fp32"]
    assert (fp32["kl"], fp32["nll_increase"], fp32["same_token"], fp32["quantized_share"]) == (0, 0, 1, 0)
    assert fp32["perplexity"] == pytest.approx(math.exp(sum(fp32["nll_per_text"]) / report["tokens"]))
    bits = [kinds[kind]["bits_per_param"] for kind in kinds]
    assert bits == pytest.approx([32, 16, 8.14, 4.51, 4.28], abs=0.05)
    assert kinds["fp32"]["model_bits_per_param"] == 32
    assert kinds["nf4"]["quantized_share"] == pytest.approx(
        report["parameters"]["linear"] / report["parameters"]["total"]
    )
    assert kinds["fp16"]["quantized_share"] > 0.99, "embeddings and head too"
    errors = [kinds[kind]["weight_error"] for kind in ("fp16", "int8", "nf4")]
    assert errors == sorted(errors)
    assert kinds["fp16"]["kl"] < kinds["int8"]["kl"] < kinds["nf4"]["kl"]
    assert kinds["nf4"]["kl_error"] > 0


def test_the_error_of_a_layer_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(64, 64, bias=False), nn.Linear(2, 2, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    one, other = Two(), Two()
    generator = torch.Generator().manual_seed(0)
    one.layer.weight.data = torch.randn(64, 64, generator=generator)
    one.layer.weight.data[3, 4] = 40.0
    other.layer.weight.data = one.layer.weight.data * 1.25
    (row,), total = layer_errors(one, other)
    assert (row.layer, row.relative_error) == ("layer", pytest.approx(0.25))
    assert (row.cosine, total) == (pytest.approx(1.0), pytest.approx(0.25))
    (spread,) = layer_weights(one)
    sigma = one.layer.weight.data.std(correction=0).item()
    assert spread.outlier_share == 1 / 64**2
    assert spread.largest_in_sigmas == pytest.approx(40 / sigma)


def test_standard_error_of_a_ratio_by_hand() -> None:
    """Three texts of 10, 10 and 20 tokens at 0.1, 0.3 and 0.2 a token: mean 0.2, residuals -1, 1, 0."""
    found = ratio(torch.tensor([1.0, 3.0, 4.0]), torch.tensor([10.0, 10.0, 20.0]))
    assert found == pytest.approx((0.2, math.sqrt(2 * 3 / 2) / 40))
    assert ratio(torch.tensor([3.0]), torch.tensor([10.0]))[1] is None


def test_the_files(report: dict[str, Any]) -> None:
    files = {Path(name).name: Path(name) for name in report["files"]}
    assert all(path.is_file() for path in files.values())
    held = json.loads(files["quantization.json"].read_text(encoding="utf-8"))
    assert held["kinds"] == json.loads(json.dumps(report["kinds"]))
    with files["quantization.csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["fp32", *KINDS_HERE]
    assert float(rows[3]["kl"]) == by_kind(report)["nf4"]["kl"]
    with files["layers.csv"].open(encoding="utf-8", newline="") as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == len(KINDS_HERE) * len(report["weights"])
    page = files["quantization.md"].read_text(encoding="utf-8")
    assert "leave embeddings, head and norms in 32 bits" in page
    assert "(1 without two tokens left out)" in page
    assert "|w| > 6 standard deviations" in page
    for name in ("error_per_layer.png", "quality_against_bits.png", "kl_per_kind.png"):
        assert files[name].read_bytes().startswith(b"\x89PNG")
        assert files[name].stat().st_size > 10_000


def test_storage_that_changes_nothing_is_drawn(tmp_path: Path) -> None:
    """Without matplotlib's warning that a logarithmic axis has nothing to show."""
    row = {"kind": "int8", "kl": 0.0, "kl_error": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _save(tmp_path / "kl.png", _draw_kl, {"model": "m", "kinds": [row]})
    assert (tmp_path / "kl.png").stat().st_size > 1000


def test_the_order_says_where_two_kinds_are_not_apart(report: dict[str, Any]) -> None:
    rows = report["order"]
    assert {row["kind"] for row in rows} == {"fp32", *KINDS_HERE}
    perplexities = [by_kind(report)[row["kind"]]["perplexity"] for row in rows]
    assert perplexities == sorted(perplexities)
    kinds = by_kind(report)
    for before, after in itertools.pairwise(rows):
        expected = kinds[after["kind"]]["nll"] - kinds[before["kind"]]["nll"]
        assert after["nll_more"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ["nf5"]}, r"unknown storage 'nf5' \(kinds\): one of bf16, fp16"),
        ({"kinds": ["int8+dq"]}, r"unknown storage 'int8\+dq'"),
        ({"kinds": ["none"]}, "unknown storage 'none'"),
        ({"texts": ["", ""]}, r"no text has two tokens \(texts\)"),
        ({"name_or_path": "./nowhere"}, "no such model directory"),
    ],
)
def test_refused_in_one_line_before_a_model_is_loaded(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lmlab.models.build.build_model", never)
    given: dict[str, Any] = {"name_or_path": EMBEDDED, "texts": TEXTS, "kinds": ["nf4"]} | arguments
    with pytest.raises(UserError, match=message):
        quantization_report(given.pop("name_or_path"), **given, accelerator="cpu", folder=tmp_path / "made")
    assert not (tmp_path / "made").exists()
