"""The probe accepts who keeps documents apart and refuses, with a reason, who does not: on transformers' own models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import ACCEPTED, REFUSED, default_config
from transformers import AttentionInterface

from lmlab.models import probe
from lmlab.models.attention import NAME, packed_attention
from lmlab.models.probe import require_flat, supports_flat, why_not_flat
from lmlab.records import UserError

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_accepted(model_type: str) -> None:
    assert why_not_flat(default_config(model_type)) is None
    assert supports_flat(default_config(model_type))


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_with_a_reason(model_type: str) -> None:
    reason = why_not_flat(default_config(model_type))
    assert reason
    assert "\n" not in reason
    assert len(reason) < 300
    assert not supports_flat(default_config(model_type))


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        ("mamba", "carry a state"),
        ("lfm2", "layers of type conv"),
        ("llama4_text", "chunked_attention"),
        ("bloom", "not transformers' exchangeable one"),
        ("stablelm", "does not pass on where the documents lie"),
        ("nemotron", "does not pass on where the documents lie"),
        ("doge", "cannot honour an attention mask"),
        ("bert", "differ from those of each document alone"),
        ("mpt", "parts of its own (attn_config)"),
    ],
)
def test_the_reason_says_what_is_wrong(model_type: str, part: str) -> None:
    assert part in (why_not_flat(default_config(model_type)) or "")


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 48}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 12}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gemma4_text", {"num_kv_shared_layers": 10}),
    ("opt", {"word_embed_proj_dim": 512, "hidden_size": 1024}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "")
def test_variants_of_a_config_are_accepted(model_type: str, changes: dict[str, Any]) -> None:
    assert why_not_flat(default_config(model_type, **changes)) is None


@pytest.fixture
def uncached() -> Iterator[None]:
    probe._reason.cache_clear()
    yield
    probe._reason.cache_clear()


@pytest.mark.parametrize(
    ("model_type", "argument"),
    [
        ("mistral", "sliding_window"),
        ("cohere2", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma2", "softcap"),
        ("gemma2", "scaling"),
        ("gpt_oss", "sliding_window"),
        ("gpt_oss", "s_aux"),
        ("granite", "scaling"),
    ],
)
def test_an_argument_that_were_ignored_is_seen(
    model_type: str, argument: str, monkeypatch: pytest.MonkeyPatch, uncached: None
) -> None:
    """The probe can fail: with the argument dropped the same architecture is refused."""

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        assert argument in kwargs
        return packed_attention(*args, **{**kwargs, argument: None})

    monkeypatch.setattr(probe, "packed_attention", forgetful)
    assert "differ from those of each document alone" in (why_not_flat(default_config(model_type)) or "")


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_leak_is_seen(model_type: str, monkeypatch: pytest.MonkeyPatch, uncached: None) -> None:
    """Two documents given to attention as one."""
    flat_row = probe._flat_row

    def merged(documents: list[torch.Tensor]) -> Any:
        batch = flat_row(documents)
        assert batch.cu_seqlens is not None
        batch.cu_seqlens = torch.cat([batch.cu_seqlens[:1], batch.cu_seqlens[2:]])
        return batch

    monkeypatch.setattr(probe, "_flat_row", merged)
    assert "a document changes the logits" in (why_not_flat(default_config(model_type)) or "")
    twin = probe._twin(default_config(model_type))
    documents = [torch.arange(3, 3 + n) for n in probe.LENGTHS]
    assert not probe._apart(twin, merged(documents))
    assert probe._apart(twin, flat_row(documents))


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("data.packing", "data.packing=false"),
        ("data.cross_document_attention", "data.cross_document_attention=true"),
    ],
)
def test_packing_is_refused_with_its_remedy(key: str, fix: str) -> None:
    require_flat(default_config("llama"), key)
    with pytest.raises(UserError) as caught:
        require_flat(default_config("mamba"), key)
    assert str(caught.value) == (
        f"documents in one row cannot be kept apart in a mamba model: its layers carry a state from token to token ({key}): {fix}"
    )


def test_a_config_that_breaks_is_a_reason_and_no_crash() -> None:
    config = default_config("llama")
    config.hidden_act = "no such function"
    assert "cannot be built" in (why_not_flat(config) or "")


def test_it_leaves_nothing_behind() -> None:
    config = default_config("gemma2")
    before, content = torch.get_rng_state(), config.to_dict()
    probe._reason.cache_clear()
    assert supports_flat(config)
    assert torch.equal(torch.get_rng_state(), before), "the training RNG was used"
    assert config.to_dict() == content
    assert AttentionInterface()[NAME] is packed_attention
    assert supports_flat(default_config("gemma2"))
    info = probe._reason.cache_info()
    assert (info.hits, info.misses) == (1, 1), "the second time is not a look-up"
