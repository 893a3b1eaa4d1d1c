"""One optimizer step is the same however its rows are cut into micro-batches and ranks: the pain of every peer (pains 1 to 3).

There is no incomplete last window here: training takes ``max_steps`` whole steps out of one endless stream, so a step
may hold the end of one epoch and the beginning of the next, and the last step of a run is as full as the first.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import (
    LOSS,
    SEED,
    STEPS,
    Gradients,
    distance,
    gradients,
    on_two_ranks,
    options,
    plain_gradient,
    prepared_data,
    rows_of_steps,
    sft_module,
    single_documents,
    step_on,
    tiny_model,
    trainer_for,
    write_records,
)

from lmlab.data.packing import blank_row, collate_flat, collate_padded
from lmlab.data.prepared import PreparedData
from lmlab.models.attention import use_packed_attention
from lmlab.models.head import CrossEntropy, supervised_logits
from lmlab.records import Example, PackedBatch, RunFailedError
from lmlab.training.datamodule import LMDataModule
from lmlab.training.modules import SCALE

pytestmark = pytest.mark.parity
# fp32, sums in another order over some thousand terms: errors of a few ulp, 1e-7 relative each; 3e-7 measured.
RELATIVE = 1e-5
# Products rounded to 8 bits (bf16) and to 11 (fp16), both against fp32; measured 3.2e-3 and 2.8e-4.
BF16, FP16 = 2e-2, 2e-3
CUTS = [(8, 1), (4, 2), (1, 8)]
LAYOUTS = ["packed", "flat", "padded"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "unequal.jsonl")


@pytest.fixture(scope="module")
def unpacked(records: Path) -> PreparedData:
    return prepared_data(records)


def cut(rows: Sequence[Example], batch_size: int, layout: str) -> list[PackedBatch]:
    """Micro-batches of one step."""
    collate = collate_padded if layout == "padded" else collate_flat
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def step_rows(records: Path, layout: str) -> list[Example]:
    return rows_of_steps(prepared_data(records, packing=layout == "packed"), 8)


# --- the gradient of one step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch_size", "accumulate"), CUTS)
def test_against_torch_loop_gradient(
    records: Path, tmp_path: Path, batch_size: int, accumulate: int, layout: str
) -> None:
    rows = step_rows(records, layout)
    assert (max(len(row.lengths) for row in rows) > 1) == (layout == "packed")
    batches = cut(rows, batch_size, layout)
    assert len(batches) == accumulate
    found, module = step_on(batches, tmp_path, flat=layout != "padded")
    expected = plain_gradient(tiny_model(), single_documents(rows))
    assert distance(expected, found) < RELATIVE
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm().item()
    assert module.totals.grad_norm == pytest.approx(norm, rel=RELATIVE)


def mean_of_means(rows: Sequence[Example], batch_size: int) -> Gradients:
    """What peers do: each micro-batch divided by its own tokens, then averaged."""
    parts = [plain_gradient(tiny_model(), rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def test_mean_of_means_would_be_seen(unpacked: PreparedData) -> None:
    """The comparisons here can fail: averaged averages are clearly another gradient on these records."""
    rows = rows_of_steps(unpacked, 8)
    exact = plain_gradient(tiny_model(), rows)
    assert distance(exact, mean_of_means(rows, 4)) > 0.05
    assert distance(exact, mean_of_means(rows, 1)) > 0.1


@pytest.mark.parametrize(("batch_size", "layout"), [(8, "flat"), (1, "flat"), (2, "padded")])
def test_against_torch_loop_label_smoothing_and_z_loss(
    unpacked: PreparedData, tmp_path: Path, batch_size: int, layout: str
) -> None:
    loss = CrossEntropy(kind="cross_entropy", label_smoothing=0.1, z_loss=0.01)
    rows = rows_of_steps(unpacked, 8)
    found, _ = step_on(cut(rows, batch_size, layout), tmp_path, flat=layout == "flat", loss=loss)
    expected = plain_gradient(tiny_model(), rows, loss)
    assert distance(expected, found) < RELATIVE
    assert distance(plain_gradient(tiny_model(), rows), found) > 0.01


# --- random splits ----------------------------------------------------------------------------------------------


def untrained(example: Example) -> Example:
    return Example(example.input_ids, torch.full_like(example.labels, -100), example.lengths)


def random_split(seed: int, documents: Sequence[Example], ranks: int) -> list[list[list[Example]]]:
    """Documents dealt at random to ranks and micro-batches, as many for each rank; some get none, or none trained."""
    rng = random.Random(seed)
    accumulate = rng.randint(1, 6)
    split: list[list[list[Example]]] = [[[] for _ in range(accumulate)] for _ in range(ranks)]
    used = 1 if ranks > 1 and seed % 3 == 0 else ranks  # every third time all trained tokens are on one rank
    for example in rng.sample(list(documents), rng.randint(1, len(documents))):
        split[rng.randrange(used)][rng.randrange(accumulate)].append(example)
    for micro in itertools.chain(*split):
        if not micro or rng.random() < 0.2:
            micro.append(untrained(rng.choice(documents)) if rng.random() < 0.5 else blank_row())
    return split


def split_distance(seed: int, documents: Sequence[Example], root: Path, ranks: int = 1) -> float:
    """How far lmlab's step on a random split is from the plain loop; called on each rank."""
    import torch.distributed as dist

    split = random_split(seed, documents, ranks)
    mine = split[dist.get_rank() if dist.is_initialized() else 0]
    found, _ = step_on([collate_flat(micro) for micro in mine], root, world_size=ranks)
    whole = [example for micro in itertools.chain(*split) for example in micro]
    return distance(plain_gradient(tiny_model(), whole), found)


@pytest.mark.parametrize("seed", range(20))
def test_against_torch_loop_random_splits(unpacked: PreparedData, tmp_path: Path, seed: int) -> None:
    assert split_distance(seed, rows_of_steps(unpacked, 20), tmp_path) < RELATIVE


def test_random_splits_hold_the_hard_cases(unpacked: PreparedData) -> None:
    documents = rows_of_steps(unpacked, 20)
    tokens = [
        [[sum(int((e.labels != -100).sum()) for e in micro) for micro in rank] for rank in split]
        for split in (random_split(seed, documents, 2) for seed in range(12))
    ]
    assert any(0 in rank for split in tokens for rank in split), "no micro-batch without trained tokens"
    assert any(sum(rank) == 0 for split in tokens for rank in split), "no rank without trained tokens"
    assert all(sum(map(sum, split)) > 0 for split in tokens)


# --- two real ranks ---------------------------------------------------------------------------------------------


def rank_steps(records: str, root: str) -> dict[str, Any]:
    """Runs on each of two ranks: 2 x 2 x 2 in every layout, then random splits."""
    import os

    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        rows = step_rows(Path(records), layout)
        # As StepBatches deals them: micro-batch m of rank r takes rows (2m + r) * 2 and the next.
        mine = [rows[(2 * micro + rank) * 2 :][:2] for micro in range(2)]
        batches = [cut(micro, 2, layout)[0] for micro in mine]
        found[layout], _ = step_on(batches, Path(root), flat=layout != "padded", world_size=2)
    documents = rows_of_steps(prepared_data(Path(records)), 20)
    found["splits"] = [split_distance(seed, documents, Path(root), ranks=2) for seed in range(12)]
    nothing, module = step_on([collate_flat([blank_row()])], Path(root), world_size=2)
    found["nothing"] = (max(float(g.abs().max()) for g in nothing.values()), module.totals.loss)
    return found


@pytest.fixture(scope="module")
def two_ranks(records: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(rank_steps, str(records), str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_torch_loop_gradient_on_two_ranks(
    two_ranks: list[dict[str, Any]], records: Path, layout: str
) -> None:
    expected = plain_gradient(tiny_model(), single_documents(step_rows(records, layout)))
    for found in two_ranks:
        assert distance(expected, found[layout]) < RELATIVE


def test_against_torch_loop_random_splits_over_two_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert len(found["splits"]) == 12
        assert max(found["splits"]) < RELATIVE
        assert found["nothing"] == (0.0, 0.0)


# --- whole runs -------------------------------------------------------------------------------------------------


def updates(model: Any) -> Gradients:
    """What training added to the initial weights; far smaller than they are, so a stricter thing to compare."""
    start = dict(tiny_model().named_parameters())
    return {name: p.detach() - start[name].detach() for name, p in model.named_parameters()}


def plain_run(prepared: PreparedData, rows_per_step: int) -> Gradients:
    model = tiny_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        plain_gradient(model, rows_of_steps(prepared, rows_per_step, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sgd.step()
    return updates(model)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (7, 3), (21, 1)])
def test_against_torch_loop_weights_over_epoch_ends(
    unpacked: PreparedData, tmp_path: Path, batch_size: int, accumulate: int, flat: bool
) -> None:
    """With 21 rows a step, of 32 or so, the second step ends one epoch and begins the next, inside a micro-batch."""
    if accumulate != 2:
        assert 21 < len(unpacked.rows("train")) < 42
        assert len(unpacked.rows("train")) % 7 != 0
    module = sft_module(tiny_model())
    if flat:
        use_packed_attention(module.model)
    chosen = options(batch_size, accumulate)
    trainer_for(chosen, tmp_path).fit(module, LMDataModule(unpacked, chosen, seed=SEED, flat=flat))
    assert module.totals.steps == STEPS
    assert distance(plain_run(unpacked, batch_size * accumulate), updates(module.model)) < RELATIVE


# --- 16 bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", BF16), ("fp16", FP16)])
def test_against_fp32_gradient_in_16_bits(
    unpacked: PreparedData, tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Rounding is of the format's size; the weighting is exact: another cut differs far less than averaged averages do."""
    rows = rows_of_steps(unpacked, 8)
    exact = plain_gradient(tiny_model(), rows)
    found = [step_on(cut(rows, size, "flat"), tmp_path, precision=precision)[0] for size, _ in CUTS]
    assert max(distance(exact, gradient) for gradient in found) < tolerance
    for (size, _), gradient in zip(CUTS[1:], found[1:], strict=True):
        assert distance(found[0], gradient) < 0.1 * distance(exact, mean_of_means(rows, size))


def test_the_divisor_is_not_rounded_with_16_bit_weights(unpacked: PreparedData, tmp_path: Path) -> None:
    """Over bf16 gradients the factor must not itself become bf16."""
    rows = rows_of_steps(unpacked, 8)
    factor = SCALE / trained_tokens(rows)
    found, _ = step_on(cut(rows, 8, "flat"), tmp_path, model=tiny_model().bfloat16())
    raw = tiny_model().bfloat16()
    use_packed_attention(raw)
    (LOSS.total(*supervised_logits(raw, collate_flat(rows))) / SCALE).backward()
    rounded = False
    for name, gradient in gradients(raw).items():
        assert torch.equal(found[name], (gradient.float() * factor).bfloat16())
        rounded |= not torch.equal(found[name], gradient * torch.tensor(factor).bfloat16())
    assert rounded, "a rounded factor would not be seen"


def trained_tokens(rows: Sequence[Example]) -> int:
    return sum(int((row.labels != -100).sum()) for row in rows)


# --- nothing to train, or not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_a_step_without_trained_tokens_changes_nothing(tmp_path: Path, flat: bool, precision: str) -> None:
    collate = collate_flat if flat else collate_padded
    found, module = step_on([collate([blank_row()])] * 2, tmp_path, flat=flat, precision=precision)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())
    assert all(torch.equal(change, torch.zeros_like(change)) for change in updates(module.model).values())
    assert (module.totals.loss, module.totals.supervised, module.totals.grad_norm) == (0.0, 0.0, 0.0)
    assert module.skipped_steps == 0


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    unpacked: PreparedData, tmp_path: Path
) -> None:
    model = tiny_model()
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    module, chosen = sft_module(model), options(2, 1)
    with pytest.raises(RunFailedError, match="at step 1"):
        trainer_for(chosen, tmp_path).fit(module, LMDataModule(unpacked, chosen, seed=SEED, flat=False))
    assert all(torch.equal(change, torch.zeros_like(change)) for change in updates(model).values())


def test_an_fp16_scale_is_out_before_clipping(unpacked: PreparedData, tmp_path: Path) -> None:
    """Under a GradScaler the logged norm is the true one (a fused AdamW would unscale only after clipping)."""
    from lmlab.training.options import AdamW

    norms: dict[str, float] = {}
    for precision in ("fp32", "fp16"):
        module, chosen = sft_module(tiny_model()), options(4, 1)
        module.optim = AdamW(
            name="adamw",
            lr=1e-3,
            weight_decay=0.0,
            betas=[0.9, 0.95],
            eps=1e-8,
            warmup_steps=0,
            schedule="constant",
            min_lr_ratio=0.1,
        )
        trainer = trainer_for(chosen, tmp_path, max_steps=1, precision=precision)
        trainer.fit(module, LMDataModule(unpacked, chosen, seed=SEED, flat=False))
        norms[precision] = module.totals.grad_norm
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)  # fp16 products
