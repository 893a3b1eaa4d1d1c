"""Static steps uncaptured on a CPU: the same ids as without, what they refuse, what they fall back to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.tiny import VOCAB, random_model

from lmlab.generation import decode, graphs
from lmlab.generation.decode import generate
from lmlab.generation.samplers import GreedySampler

PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (4, 11, 2, 17, 11, 7)
]
NEW = 24


def build(name: str) -> Any:
    model = random_model(name).eval()
    model.set_attn_implementation("sdpa")
    return model


def run(model: Any, eos: Any = ()) -> list[list[int]]:
    sampler = GreedySampler(kind="greedy", max_new_tokens=NEW)
    rows = generate(model, PROMPTS, sampler=sampler, eos_token_ids=eos, seeds=range(len(PROMPTS)))
    return [row.token_ids for row in rows]


@pytest.fixture
def static_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Switch static steps on and count them by the shape of their ids and buffers."""
    monkeypatch.setattr(decode, "_wants_static", lambda *args: True)
    real, seen = graphs.StaticSteps._forward, []

    def counted(self: Any) -> torch.Tensor:
        seen.append((len(self._ids), len(self._columns)))
        return real(self)

    monkeypatch.setattr(graphs.StaticSteps, "_forward", counted)
    return seen


# mistral: windows in all layers; qwen2, olmo3, cohere2, gemma3_text: windowed and full layers mixed.
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "olmo3",
        "cohere2",
        "phi",
        "opt",
        "gpt_neox",
    ],
)
def test_static_steps_write_the_same_ids(name: str, static_calls: list[Any], capsys: Any) -> None:
    model = build(name)
    with pytest.MonkeyPatch.context() as off:
        off.setattr(decode, "_wants_static", lambda *args: False)
        free = run(model)
        eos = sorted({free[0][4], free[3][10]})
        expected = run(model, eos)
    assert not static_calls
    assert run(model, eos) == expected
    assert run(model) == free
    assert "without CUDA graphs" not in capsys.readouterr().err
    assert len(static_calls) >= NEW - 1


def test_half_of_the_rows_leave_at_once_and_buffers_grow(
    static_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmlab.generation import cache

    model = build("llama")
    free = run(model)
    static_calls.clear()
    monkeypatch.setattr(cache, "GROW", 4)
    monkeypatch.setattr(cache, "ALIGNED", 4)
    assert run(model) == free
    assert len({columns for _, columns in static_calls}) > 1
    static_calls.clear()
    eos = sorted({row[3] for row in free[:3]})
    run(model, eos)
    assert {rows for rows, _ in static_calls} >= {6}
    assert all(rows in (6, 3, 2, 1) for rows, _ in static_calls)


def test_a_step_that_does_not_agree_is_dropped_and_said_once(
    static_calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = build("llama")
    with pytest.MonkeyPatch.context() as off:
        off.setattr(decode, "_wants_static", lambda *args: False)
        expected = run(model)
    graphs._say_once.cache_clear()
    monkeypatch.setattr(
        graphs.StaticSteps, "_masks", lambda self: torch.ones_like(self._seen)[:, None, None]
    )  # sees empty columns
    assert run(model) == expected
    assert run(model) == expected
    assert len(static_calls) == 2  # one for each decode
    assert capsys.readouterr().err.count("decoding without CUDA graphs: its logits differ by") == 1


def test_a_step_that_raises_goes_on_without(
    static_calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = build("llama")
    expected, real = run(model), graphs.StaticSteps._forward
    graphs._say_once.cache_clear()
    for good in (0, 1, 2, 5):  # while it is checked, and later

        def fails(self: Any, good: int = good) -> torch.Tensor:
            if self._layers[0].filled >= 17 + good:
                raise RuntimeError("operation not permitted when stream is capturing")
            return real(self)

        monkeypatch.setattr(graphs.StaticSteps, "_forward", fails)
        assert run(model) == expected
    assert capsys.readouterr().err.count("not permitted when stream is capturing") == 1


def test_few_steps_eager_attention_and_other_caches_are_left_to_the_plain_path() -> None:
    from lmlab.generation.cache import filled_cache

    model = build("llama")
    cache = filled_cache(model, num_rows=2, columns=8)
    accepted = {"position_ids", "past_key_values"}
    assert graphs.serves(model, cache, accepted, num_steps=graphs.MIN_STEPS)
    assert not graphs.serves(model, cache, accepted, num_steps=graphs.MIN_STEPS - 1)
    assert not graphs.serves(model, None, accepted, num_steps=64)
    assert not graphs.serves(model, cache, {"past_key_values"}, num_steps=64)
    model.set_attn_implementation("eager")
    assert not graphs.serves(model, cache, accepted, num_steps=64)
