"""Samplers: their processors are transformers' own, draws follow the exact distribution, bad settings are refused.

The chi-square test draws 100,000 tokens at fixed logits through `decode.generate` itself, with a stub model, and
compares the counts with the distribution computed here in numpy's fp64 from the papers' definitions (no warper involved).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from lmlab.generation.decode import generate
from lmlab.generation.samplers import SamplerConfig, draw
from lmlab.registry import samplers

CONF = Path(__file__).parents[2] / "conf" / "sampler"
KINDS = [
    *("greedy", "temperature", "top_k", "top_p", "top_p_temperature"),
    *("min_p", "typical", "combined"),
]
ALL_OFF: dict[str, Any] = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"))
SETTINGS = [
    {"kind": "temperature", "temperature": 0.7},
    {"kind": "temperature", "temperature": 1.0},
    {"kind": "top_k", "top_k": 5, "temperature": 1.0},
    {"kind": "top_k", "top_k": 7, "temperature": 1.4},
    {"kind": "top_p", "top_p": 0.8},
    {"kind": "top_p", "top_p": 1.0},
    {"kind": "top_p_temperature", "temperature": 0.6, "top_p": 0.9},
    {"kind": "min_p", "min_p": 0.2, "temperature": 1.3},
    {"kind": "typical", "typical_p": 0.5, "temperature": 1.0},
    {"kind": "typical", "typical_p": 0.6, "temperature": 0.5},
    {**ALL_OFF, "kind": "combined"},
    {**ALL_OFF, "kind": "combined", "temperature": 0.7, "top_k": 8, "top_p": 0.9},
    {"kind": "combined", "temperature": 1.2, "top_k": 10, "top_p": 0.95, "min_p": 0.1, "typical_p": 0.8},
]
IDS = ["-".join(str(value) for value in setting.values()) for setting in SETTINGS]
NO_IDS: Any = torch.zeros(1, 1, dtype=torch.int64)


def make(**settings: Any) -> SamplerConfig:
    """The sampler of these settings, validated as a run's config is."""
    return TypeAdapter(samplers.union()).validate_python({"max_new_tokens": 8, **settings})


class FixedLogits(nn.Module):
    """A model that answers the same logits whatever it reads, and keeps no cache."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.get_buffer("fixed").expand(*input_ids.shape, -1))


def exact_distribution(logits: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The sampler's distribution from the definitions, filter by filter in fp64: ``[vocab] -> [vocab]``.

    Each filter works on what the one before has left, renormalized; in the order temperature, top-k, top-p, min-p, typical.
    """
    temperature = settings.get("temperature")
    weights = np.exp(logits.numpy().astype(np.float64) / (1.0 if temperature is None else temperature))
    p = weights / weights.sum()

    def keep(tokens: Any) -> None:
        nonlocal p
        kept = np.zeros_like(p)
        kept[tokens] = p[tokens]
        p = kept / kept.sum()

    def until(order: Any, mass: float) -> Any:
        """As many of ``order`` as together first reach ``mass``."""
        return order[: int(np.searchsorted(np.cumsum(p[order]), mass)) + 1]

    if settings.get("top_k") is not None:
        keep(np.argsort(-p)[: settings["top_k"]])
    if settings.get("top_p") is not None:
        keep(until(np.argsort(-p), settings["top_p"]))
    if settings.get("min_p") is not None:
        keep(np.flatnonzero(p >= settings["min_p"] * p.max()))
    if settings.get("typical_p") is not None:
        possible = np.flatnonzero(p)
        information = -np.log(p[possible])
        entropy = (p[possible] * information).sum()
        keep(until(possible[np.argsort(np.abs(information - entropy))], settings["typical_p"]))
    return torch.from_numpy(p)


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's test: the probability of counts at least this far off, if ``probabilities`` are true."""
    assert counts[probabilities == 0].sum() == 0, "a token that was ruled out was drawn"
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() >= 5, "too few draws for the chi-square approximation"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    half_freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))


def test_the_chi_square_statistic_agrees_with_tables() -> None:
    # 3 equal cells, statistic 5.991 at 2 degrees of freedom is the 5 % point of every table.
    offset = (5.991 * 100 / 2) ** 0.5
    counts = torch.tensor([100 + offset, 100 - offset, 100], dtype=torch.float64)
    assert chi_square_p(counts, torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_100000_draws_follow_the_exact_distribution(settings: dict[str, Any]) -> None:
    logits = torch.linspace(2.0, -2.0, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    sampler = make(**{**settings, "max_new_tokens": 100})
    rows = generate(FixedLogits(logits), [[0]] * 1000, sampler=sampler, eos_token_ids=(), seeds=range(1000))
    tokens = torch.tensor([row.token_ids for row in rows]).flatten()
    assert len(tokens) == 100_000
    counts = torch.bincount(tokens, minlength=12).double()
    assert chi_square_p(counts, exact_distribution(logits, settings)) > 1e-4


def test_first_draws_of_consecutive_seeds_are_independent() -> None:
    # A row's seed is often a counter: the first numbers of neighbouring generators must not be related.
    logits = torch.linspace(1.0, -1.0, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in range(20_000)]
    tokens = draw(logits.expand(20_000, -1), generators)
    probabilities = logits.double().softmax(-1)
    assert chi_square_p(torch.bincount(tokens, minlength=8).double(), probabilities) > 1e-4
    pairs = torch.bincount(tokens[::2] * 8 + tokens[1::2], minlength=64).double()
    assert chi_square_p(pairs, torch.outer(probabilities, probabilities).flatten()) > 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_processors_give_transformers_own_filtered_scores(settings: dict[str, Any]) -> None:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    options = {key: value for key, value in settings.items() if key != "kind"}
    options |= {"top_k": options.get("top_k") or 0}
    model: Any = LlamaForCausalLM(config)
    theirs = model._get_logits_processor(GenerationConfig(do_sample=True, **options))
    scores: Any = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 3
    ids: Any = torch.zeros(50, 1, dtype=torch.int64)
    assert torch.equal(make(**settings).processors()(ids, scores), theirs(ids, scores))


def support(logits: torch.Tensor, draws: int, **settings: Any) -> set[int]:
    """The tokens that come among ``draws``."""
    sampler = make(**settings, max_new_tokens=draws // 100)
    rows = generate(FixedLogits(logits), [[0]] * 100, sampler=sampler, eos_token_ids=(), seeds=range(100))
    return {token for row in rows for token in row.token_ids}


def test_a_token_of_095_is_alone_under_top_p_09_and_has_company_above_it() -> None:
    logits = torch.tensor([0.02, 0.95, 0.03]).log()
    assert support(logits, 2000, kind="top_p", top_p=0.9) == {1}
    assert support(logits, 2000, kind="top_p", top_p=0.96) == {1, 2}


def test_top_k_50_leaves_the_50_best() -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0)) / 4
    assert support(logits, 10_000, kind="top_k", top_k=50, temperature=1.0) == set(
        logits.topk(50).indices.tolist()
    )


def test_a_low_temperature_is_greedy_and_a_high_one_flattens() -> None:
    logits = torch.tensor([0.0, 1.0, 0.9, -1.0])
    assert support(logits, 2000, kind="temperature", temperature=0.005) == {1}
    sampler = make(kind="temperature", temperature=1000.0, max_new_tokens=100)
    rows = generate(FixedLogits(logits), [[0]] * 200, sampler=sampler, eos_token_ids=(), seeds=range(200))
    counts = torch.bincount(torch.tensor([row.token_ids for row in rows]).flatten(), minlength=4)
    # Within 0.1 % of even: 20,000 draws cannot tell it from even, nor from the exact distribution.
    assert chi_square_p(counts.double(), torch.full((4,), 0.25, dtype=torch.float64)) > 1e-4


def test_min_p_is_relative_to_the_best_token() -> None:
    scores: Any = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = make(kind="min_p", min_p=0.25, temperature=1.0).processors()(NO_IDS, scores)
    assert kept.isfinite().tolist() == [[True, True, True, False]], "0.125 is the threshold"


def test_typical_leaves_out_a_token_that_says_too_little() -> None:
    scores: Any = torch.tensor([[0.64, *[0.045] * 8]]).log()
    kept = make(kind="typical", typical_p=0.3, temperature=1.0).processors()(NO_IDS, scores)
    entropy = -(0.64 * np.log(0.64) + 0.36 * np.log(0.045))
    assert abs(-np.log(0.64) - entropy) < abs(-np.log(0.045) - entropy)
    assert kept.isfinite()[0].tolist() == [True] + [False] * 8
    scores = torch.tensor([[0.28, *[0.09] * 8]]).log()
    kept = make(kind="typical", typical_p=0.3, temperature=1.0).processors()(NO_IDS, scores)
    assert not kept.isfinite()[0, 0], "here the frequent one is further off"


def test_a_token_over_top_p_stays_alone() -> None:
    scores: Any = torch.tensor([[0.95, 0.03, 0.02]]).log()
    kept = make(kind="top_p", top_p=0.9).processors()(NO_IDS, scores)
    assert kept.isfinite().tolist() == [[True, False, False]]


def test_top_p_keeps_the_token_that_crosses_the_line() -> None:
    scores: Any = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = make(kind="top_p", top_p=0.6).processors()(NO_IDS, scores)
    assert kept.isfinite().tolist() == [[True, True, False, False]]


def test_temperature_acts_before_top_p() -> None:
    # At temperature 1 the first token has 0.6 < 0.9; at 0.25 it has 0.6**4 of 0.138, over 0.9, and stays alone.
    scores: Any = torch.tensor([[0.6, 0.3, 0.1]]).log()
    cold = make(kind="top_p_temperature", temperature=0.25, top_p=0.9).processors()(NO_IDS, scores)
    assert cold.isfinite().tolist() == [[True, False, False]]


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    scores: Any = torch.randn(2, 5)
    assert torch.equal(make(kind="top_k", top_k=999, temperature=1.0).processors()(NO_IDS, scores), scores)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if "temperature" in s], ids=str)
def test_temperature_0_is_argmax(settings: dict[str, Any]) -> None:
    sampler = make(**{**settings, "temperature": 0})
    assert not sampler.draws
    assert len(sampler.processors()) == 0
    logits = torch.tensor([0.0, 1.0, 0.999, -1.0])
    [row] = generate(FixedLogits(logits), [[0]], sampler=sampler, eos_token_ids=(), seeds=[5])
    assert row.token_ids == [1] * 8


def test_greedy_never_draws_and_the_others_do() -> None:
    assert not make(kind="greedy").draws
    assert all(make(**settings).draws for settings in SETTINGS)


def test_draw_never_takes_a_token_that_was_ruled_out() -> None:
    # The ends of the vocabulary are where an off-by-one in the inverted distribution would show.
    scores = torch.full((2000, 6), -torch.inf)
    scores[:, 2] = 0.0
    scores[:, 3] = -3.0
    tokens = draw(scores, [torch.Generator().manual_seed(seed) for seed in range(2000)])
    assert set(tokens.tolist()) == {2, 3}


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-53, 2)])
def test_draw_at_the_ends_of_the_unit_interval(
    uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, uniform, dtype=torch.float64))
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert draw(scores, [torch.Generator()]).tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_each_yaml_is_a_valid_sampler(kind: str) -> None:
    common = yaml.safe_load((CONF / "_constraints.yaml").read_text())
    values = {**common, **yaml.safe_load((CONF / f"{kind}.yaml").read_text())}
    assert values.pop("defaults") == ["_constraints", "_self_"]
    sampler = TypeAdapter(samplers.union()).validate_python(values)
    assert sampler.kind == kind
    # Every field stands in the YAML, so that an override needs no "+".
    assert set(values) == set(type(sampler).model_fields)


def test_the_registry_knows_exactly_the_documented_kinds() -> None:
    assert set(KINDS) <= set(samplers.names())
    assert {path.stem for path in CONF.glob("[!_]*.yaml")} == set(KINDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "greedy", "temperature": 0.5},
        {"kind": "top_p", "top_p": 0.9, "temperature": 0.5},
        {"kind": "temperature", "temperature": 0.5, "top_k": 3},
        {"kind": "temperature"},
        {"kind": "temperature", "temperature": -0.1},
        {"kind": "temperature", "temperature": 1e-9},
        {"kind": "temperature", "temperature": float("inf")},
        {"kind": "temperature", "temperature": float("nan")},
        {"kind": "top_k", "top_k": 0, "temperature": 1.0},
        {"kind": "top_k", "top_k": 2.5, "temperature": 1.0},
        {"kind": "top_p", "top_p": 0.0},
        {"kind": "top_p", "top_p": 1.01},
        {"kind": "greedy", "max_new_tokens": 0},
        {"kind": "typical"},
        {"kind": "mirostat"},
        {"kind": "min_p", "min_p": 1.5, "temperature": 1.0},
        {"kind": "typical", "typical_p": 0.0, "temperature": 1.0},
        {**ALL_OFF, "kind": "combined", "top_k": 0},
        {"kind": "greedy", "repetition_penalty": 0.0},
        {"kind": "greedy", "no_repeat_ngram_size": -1},
        {"kind": "greedy", "bad_words": [""]},
        {"kind": "greedy", "bad_words": "one string"},
        {"kind": "greedy", "stop": [""]},
        {"kind": "greedy", "begins_with": "a catalogue", "bad_words": ["cat"]},
    ],
    ids=str,
)
def test_a_setting_that_has_no_meaning_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make(**settings)


def test_importing_the_samplers_imports_neither_torch_nor_transformers() -> None:
    check = "import sys, lmlab.generation.samplers; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
