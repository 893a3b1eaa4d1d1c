"""A real small llama against logits computed by an independent numpy forward pass (see its reference.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmlab.models.attention import Documents, use_packed_attention
from lmlab.models.build import Pretrained, build_model

pytestmark = pytest.mark.parity
ABSOLUTE = 2e-5  # the reference is printed to five decimals and summed in another order


@pytest.fixture(scope="module")
def loaded(real_data: Path) -> tuple[Any, dict[str, Any]]:
    folder = real_data / "stories260k-hf"
    about = Pretrained(
        kind="pretrained",
        name_or_path=str(folder),
        revision=None,
        trust_remote_code=False,
        gradient_checkpointing=False,
    )
    model = build_model(about, about.hf_config(None), seed=0, dtype=torch.float32)
    return model.eval(), json.loads((folder / "reference.json").read_text())


def last_logits(model: Any, prompts: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([p["prompt_ids"]])).logits[0, -1] for p in prompts]


def assert_logits(found: list[torch.Tensor], prompts: list[dict[str, Any]]) -> None:
    for logits, prompt in zip(found, prompts, strict=True):
        expected = torch.tensor(prompt["last_logits_first8"])
        assert (logits[:8] - expected).abs().max() < ABSOLUTE
        assert logits.topk(5).indices.tolist() == prompt["top5_ids"]


def test_against_numpy_forward_last_logits(loaded: tuple[Any, dict[str, Any]]) -> None:
    model, reference = loaded
    assert_logits(last_logits(model, reference["prompts"]), reference["prompts"])


def test_against_numpy_forward_all_prompts_in_one_flat_row(loaded: tuple[Any, dict[str, Any]]) -> None:
    model, reference = loaded
    prompts = reference["prompts"]
    ids = [torch.tensor(p["prompt_ids"]) for p in prompts]
    ends = torch.tensor([0, *(len(i) for i in ids)]).cumsum(0)
    standard = model.config._attn_implementation
    use_packed_attention(model)
    try:
        with torch.no_grad():
            out = model(
                input_ids=torch.cat(ids)[None],
                position_ids=torch.cat([torch.arange(len(i)) for i in ids])[None],
                use_cache=False,
                lmlab_documents=Documents(ends.int()),
            )
    finally:
        model.set_attn_implementation(standard)
    assert_logits([out.logits[0, end - 1] for end in ends[1:].tolist()], prompts)


def test_against_numpy_forward_greedy(loaded: tuple[Any, dict[str, Any]]) -> None:
    """Each token of the reference's greedy text is the model's own first choice."""
    model, reference = loaded
    ids = torch.tensor([reference["greedy_from_bos_ids"]])
    with torch.no_grad():
        choices = model(ids).logits[0].argmax(-1)
    assert choices[:-1].tolist() == ids[0, 1:].tolist()
