"""Samplers with everything on against transformers' ``generate``, on random models of six architectures.

transformers reads each prompt alone and unpadded, lmlab all of them in one left-padded batch: what a sampler does to a
row must not depend on the padding. Tokens are single characters, so that a string is banned by one sequence of tokens,
which is what transformers' processor bans.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.tiny import VOCAB, random_model

from lmlab.generation import decode
from lmlab.generation.decode import Generated, generate
from lmlab.generation.samplers import load_sampler
from lmlab.tokenizers import train_chars

pytestmark = pytest.mark.parity

ARCHITECTURES = ("llama", "gpt2", "gemma2", "qwen3", "mistral", "gpt_neox")
NEW = 16
TIE = 1e-4
"""Two tokens whose scores differ by less, relative to the largest, may swap: other matrix shapes round otherwise."""
ROUNDING = 1e-4
"""Of scores, relative to the largest: sums over other shapes in fp32 (seen: up to 1e-5)."""
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (4, 11, 2, 17, 11, 7)
]
TOKENIZER = train_chars(
    ["".join(map(chr, range(33, 127)))], special_tokens=["<eos>", "<pad>"], max_chars=1000
)
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"kind": "temperature", "temperature": 1.5},
    "top_k": {"kind": "top_k", "top_k": 20, "temperature": 1.5},
    "top_p": {"kind": "top_p", "top_p": 0.8},
    "min_p": {"kind": "min_p", "min_p": 0.8, "temperature": 1.5},
    "typical": {"kind": "typical", "typical_p": 0.7, "temperature": 1.5},
    "all": {
        **{"kind": "combined", "temperature": 2.0, "top_k": 60, "top_p": 0.97, "min_p": 0.02},
        **{"typical_p": 0.9, **PENALTIES},
    },
}


def sampler_of(**values: Any) -> Any:
    return load_sampler({"max_new_tokens": NEW, **values})


def own(model: Any, sampler: Any) -> list[Generated]:
    return generate(
        model, PROMPTS, sampler=sampler, eos_token_ids=(), seeds=range(len(PROMPTS)), tokenizer=TOKENIZER
    )


def theirs(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
    """transformers' new ids for one prompt, and the processed scores of each step ``[steps, vocab]``."""
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=NEW,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.scores).float()


def scale(scores: torch.Tensor) -> float:
    return float(scores[scores.isfinite()].abs().max())


def banned_for(model: Any) -> tuple[list[str], list[list[int]]]:
    """Strings of one, two and three characters that the model would write, and their tokens."""
    free = [row.token_ids for row in own(model, sampler_of(kind="greedy"))]
    ids = [free[0][:1], free[1][2:4], free[2][:2], free[3][4:7]]
    words = [str(TOKENIZER.decode(sequence)) for sequence in ids]
    kept = [(word, sequence) for word, sequence in zip(words, ids, strict=True) if len(word) == len(sequence)]
    assert len(kept) >= 2, "special tokens are no text"
    return [word for word, _ in kept], [sequence for _, sequence in kept]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_against_transformers_greedy_with_penalties_and_banned_words(name: str) -> None:
    model = random_model(name).eval()
    words, ids = banned_for(model)
    rows = own(model, sampler_of(kind="greedy", bad_words=words, **PENALTIES))
    free, compared, changed = own(model, sampler_of(kind="greedy")), 0, 0
    for prompt, row, unbound in zip(PROMPTS, rows, free, strict=True):
        expected, scores = theirs(model, prompt, do_sample=False, bad_words_ids=ids, **PENALTIES)
        best = scores.topk(2, dim=-1).values
        tied = ((best[:, 0] - best[:, 1]) / scale(scores) < TIE).tolist()
        clear = tied.index(True) if True in tied else NEW
        assert row.token_ids[:clear] == expected[:clear]
        compared += clear
        changed += row.token_ids != unbound.token_ids
    assert compared >= 0.8 * NEW * len(PROMPTS)
    assert changed >= 4, "the constraints should have changed most rows"


FAST = [("llama", setting) for setting in SETTINGS] + [(name, "all") for name in ARCHITECTURES[1:]]
EVERY: list[Any] = [
    (name, setting) if (name, setting) in FAST else pytest.param(name, setting, marks=pytest.mark.slow)
    for name in ARCHITECTURES
    for setting in SETTINGS
]


@pytest.mark.parametrize(("name", "setting"), EVERY)
def test_against_transformers_seeded_sampling(
    name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same uniform numbers transformers' own loop draws the same ids from the same scores."""
    model, values = random_model(name).eval(), dict(SETTINGS[setting])
    options = {key: value for key, value in values.items() if key != "kind"}
    if setting == "all":
        values["bad_words"], options["bad_words_ids"] = banned_for(model)
    steps: list[torch.Tensor] = []
    order: list[list[int]] = []
    real, logits = decode.draw, decode._Batch.logits
    monkeypatch.setattr(decode, "draw", lambda scores, g: (steps.append(scores), real(scores, g))[1])
    monkeypatch.setattr(
        decode._Batch, "logits", lambda batch: (order.append([r.index for r in batch.rows]), logits(batch))[1]
    )
    rows = own(model, sampler_of(**values))
    own_scores = [
        torch.stack([step[places.index(index)] for step, places in zip(steps, order[-NEW:], strict=True)])
        for index in range(len(PROMPTS))
    ]
    filtered = compared = 0
    for index, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        uniforms = torch.Generator().manual_seed(index)

        def inverted(p: torch.Tensor, num_samples: int, g: Any = uniforms, **_: Any) -> torch.Tensor:
            cumulative = p.double().cumsum(-1)
            target = torch.rand(1, 1, generator=g, dtype=torch.float64) * cumulative[:, -1:]
            return torch.searchsorted(cumulative, target, right=True)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "multinomial", inverted)
            given = {"top_k": 0, **options}
            expected, scores = theirs(model, prompt, do_sample=True, **given)
        # Two tokens that a cut finds equally good but for rounding (as far from the entropy) may swap; the texts then part.
        same = (own_scores[index].isneginf() == scores.isneginf()).all(-1).tolist()
        clear = same.index(False) if False in same else NEW
        assert row.token_ids[:clear] == expected[:clear]
        compared += clear
        possible = scores[:clear].isfinite()
        difference = (own_scores[index][:clear][possible] - scores[:clear][possible]).abs().max()
        assert float(difference) < ROUNDING * scale(scores)
        filtered += int(scores.isneginf().sum())
    assert compared >= 0.8 * NEW * len(PROMPTS)
    assert (filtered > 0) == (setting != "temperature")
