"""Likelihood of given texts against plain transformers, and that every token is scored once whatever the windows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lmlab.data.packing import DocumentRows, StreamRows
from lmlab.data.shards import Shards, ShardWriter, write_index
from lmlab.evaluation.likelihood import StridedRows, likelihood
from lmlab.records import IGNORE_INDEX, UserError
from tests.parity.tiny import VOCAB, random_model

RELATIVE = 1e-6  # fp32 sums of some hundred terms, in another order
CPU = torch.device("cpu")


def shards(folder: Path, documents: list[list[int]], *, trained_from: int = 0) -> Shards:
    """Documents of token ids, of which those before ``trained_from`` are not trained."""
    writer = ShardWriter(folder, vocab_size=VOCAB, flags=True)
    for ids in documents:
        writer.add(np.asarray(ids), np.arange(len(ids)) >= trained_from)
    write_index(folder, [writer.close()])
    return Shards(folder)


def stream(folder: Path, length: int) -> tuple[Shards, list[int]]:
    """One stream of random tokens, and the tokens."""
    ids = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    return shards(folder, [ids]), ids


@torch.no_grad()
def of_guide(model: Any, ids: list[int], *, max_length: int, stride: int) -> tuple[float, int]:
    """Summed nll and tokens by the loop of transformers' guide "Perplexity of fixed-length models"."""
    model.eval()
    nll, counted, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        given = torch.tensor([ids[begin:end]])
        labels = given.clone()
        labels[:, : -(end - previous)] = -100
        logits = model(given).logits[0, :-1]
        nll += float(F.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        counted += int((labels[0, 1:] != -100).sum())
        previous = end
        if end == len(ids):
            break
    return nll, counted


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("stride", [3, 8, 16])
def test_against_transformers_guide_windows(tmp_path: Path, model_type: str, stride: int) -> None:
    model = random_model(model_type)
    given, ids = stream(tmp_path, 61)
    found = likelihood(
        model, StridedRows(given, max_length=16, stride=stride), num_bytes=100, batch_size=3, device=CPU
    )
    nll, counted = of_guide(model, ids, max_length=17, stride=stride)
    assert found.num_tokens == counted == 60
    assert found.nll == pytest.approx(nll, rel=RELATIVE)
    assert found.perplexity == pytest.approx(math.exp(nll / 60), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / 100, rel=RELATIVE)


@pytest.mark.parity
def test_against_transformers_loss_of_documents(tmp_path: Path) -> None:
    """Supervised tokens of documents of any length, padded together, against each alone with transformers' labels."""
    model = random_model("llama")
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (9, 30, 4, 17)]
    rows = DocumentRows(shards(tmp_path, documents, trained_from=3), max_length=64, packing=False)
    found = likelihood(model, rows, num_bytes=0, batch_size=3, device=CPU)
    nll = 0.0
    model.eval()
    for ids in documents:
        labels = torch.tensor([[-100] * 3 + ids[3:]])
        with torch.no_grad():
            nll += float(model(torch.tensor([ids]), labels=labels).loss) * (len(ids) - 3)
    assert found.num_tokens == sum(len(ids) - 3 for ids in documents)
    assert found.nll == pytest.approx(nll, rel=RELATIVE)
    assert found.bits_per_byte is None


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 40])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_token_is_scored_once_with_its_context(tmp_path: Path, length: int, stride: int) -> None:
    given, ids = stream(tmp_path, length)
    rows = StridedRows(given, max_length=16, stride=stride)
    scored = []
    for index in range(len(rows)):
        row = rows[index]
        assert row.input_ids.tolist() == ids[index * stride :][: len(row.input_ids)]
        for place, label in enumerate(row.labels.tolist()):
            if label != IGNORE_INDEX:
                position = index * stride + place + 1
                assert label == ids[position]
                assert place + 1 >= min(position, 16 - stride + 1)  # tokens it sees
                scored.append(position)
    assert scored == list(range(1, length))
    if stride == 16:
        plain = StreamRows(given, max_length=16)
        assert [rows[i].labels.tolist() for i in range(len(rows))] == [
            plain[i].labels.tolist() for i in range(len(plain))
        ]


def test_flags_of_every_submodule_come_back(tmp_path: Path) -> None:
    model = random_model("gpt2")
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    likelihood(
        model, StreamRows(stream(tmp_path, 20)[0], max_length=8), num_bytes=1, batch_size=2, device=CPU
    )
    assert [module.training for module in model.modules()] == before


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    rows = DocumentRows(shards(tmp_path, [[1, 2, 3]], trained_from=3), max_length=8, packing=False)
    with pytest.raises(UserError, match="no token to score"):
        likelihood(random_model("gpt2"), rows, num_bytes=1, batch_size=2, device=CPU)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_out_of_range_is_an_error(tmp_path: Path, stride: int) -> None:
    with pytest.raises(UserError, match=f"a stride of {stride} with windows of 8 tokens"):
        StridedRows(stream(tmp_path, 20)[0], max_length=8, stride=stride)


@pytest.mark.parity
def test_against_transformers_on_stories260k(real_data: Path, tmp_path: Path) -> None:
    """A real text through the whole of lmlab's reading, against the tokenizer and model of transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmlab.load import load_for_use
    from lmlab.measured import DataChoice, DataSets

    folder = real_data / "stories260k-hf"
    text = json.loads((folder / "reference.json").read_text())["greedy_from_bos_text"]
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    choice = DataChoice.of(str(tmp_path / "story.txt"), settings=["data.max_length=64"], task=None, side=None)
    usable, data = load_for_use(str(folder), accelerator="cpu"), DataSets(None)
    try:
        measured = data.get(choice, usable, str(folder))
        found = likelihood(
            usable.model,
            StridedRows(measured.prepared.rows("val").shards, max_length=64, stride=16),  # type: ignore[union-attr]
            num_bytes=measured.counts["supervised_bytes"],
            batch_size=4,
            device=CPU,
        )
    finally:
        data.close()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ids = [eos, *tokenizer(text).input_ids, eos]
    nll, counted = of_guide(AutoModelForCausalLM.from_pretrained(folder), ids, max_length=65, stride=16)
    if ids[1] == bos:  # read, and not trained: taken out of the reference
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids[:1]])).logits[0]
        nll, counted = nll - float(F.cross_entropy(logits, torch.tensor([bos]))), counted - 1
    assert found.num_tokens == counted
    assert found.num_bytes == len(text.encode())
    assert found.nll == pytest.approx(nll, rel=RELATIVE)
    assert found.loss < 1.0  # its own greedy text: it was not read as noise
