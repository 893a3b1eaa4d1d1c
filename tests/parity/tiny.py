"""Tiny random models and batches for the parity tests: small enough for a second, large enough for attention to matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmlab.data.packing import collate_flat, collate_padded
from lmlab.records import IGNORE_INDEX, Example, PackedBatch

VOCAB = 97
LENGTHS = (5, 9, 13, 9, 3)  # two of equal length, one longer than every window below
WINDOW = 4
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
_GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
_WINDOWED = {"sliding_window": WINDOW}
_PARTLY_WINDOWED = {  # one full layer, one windowed one
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "mistral": _SHAPE | _WINDOWED,
    "phi3": _SHAPE | _WINDOWED,
    "starcoder2": _SHAPE | _WINDOWED | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "qwen2": _SHAPE | _PARTLY_WINDOWED,
    "qwen3": _SHAPE | _PARTLY_WINDOWED | {"head_dim": 24},  # 4 * 24 is not hidden_size
    "smollm3": _SHAPE | _PARTLY_WINDOWED,
    "granite": _SHAPE
    | {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "gpt_neox": {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"},
}

_ACCEPTED = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text phi phi3 gpt2 gpt_bigcode gpt_neox opt olmo olmo2 "
    "olmo3 granite smollm3 cohere cohere2 starcoder2 glm4 exaone4 nanochat minicpm3 deepseek_v3 mixtral qwen3_moe "
    "olmoe granitemoe gpt_oss"
)
ILL_CONDITIONED = {"gemma4_text": 4e-5}
"""Architectures whose gradients fp32 itself gets no better: transformers' own are 1.7e-5 from those in double here."""
_REFUSED = (
    "mamba mamba2 falcon_mamba rwkv recurrent_gemma bamba jamba qwen3_next granitemoehybrid falcon_h1 codegen bloom "
    "gpt_neo gptj falcon mpt llama4_text stablelm doge bert"
)
ACCEPTED: dict[str, dict[str, Any]] = {
    **{name: {} for name in _ACCEPTED.split()},
    "ministral": {"head_dim": 128},
}
"""Architectures that the probe accepts, with what a config class leaves out and its model needs."""
REFUSED: dict[str, dict[str, Any]] = {
    **{name: {} for name in _REFUSED.split()},
    "nemotron": {"num_key_value_heads": 8},
    "lfm2": {"full_attn_idxs": [2, 5, 8], "layer_types": None},
}
"""Architectures whose documents would see one another in a flat row, or that cannot take one."""


def default_config(model_type: str, **changes: Any) -> Any:
    """The config of a real size that transformers gives this architecture."""
    return AutoConfig.for_model(model_type, **(ACCEPTED | REFUSED)[model_type] | changes)


def random_model(model_type: str, *, std: float = 0.15, **changes: Any) -> Any:
    """A model of this type with all weights N(0, std) (norms around 1), in eager attention and training mode."""
    special = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **(SHAPES.get(model_type, _SHAPE) | special | changes))
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.train()


def documents(lengths: Sequence[int] = LENGTHS, *, seed: int = 1, ignore: float = 0.3) -> list[Example]:
    """Examples of random tokens, a share ``ignore`` of the labels not trained."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = torch.randint(3, VOCAB, (length,), generator=generator)
        labels[torch.rand(length, generator=generator) < ignore] = IGNORE_INDEX
        labels[-1] = 2
        found.append(Example(ids, labels, (length,)))
    return found


def flat(examples: Sequence[Example]) -> PackedBatch:
    """All documents in one row."""
    return collate_flat(examples)


def padded(examples: Sequence[Example]) -> PackedBatch:
    """One document a row."""
    return collate_padded(examples)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(model: Any) -> torch.Tensor:
    """All gradients in one vector, and the model's cleared."""
    parts = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative distance of whole vectors."""
    return ((found - expected).norm() / expected.norm()).item()


def transformers_greedy(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    """transformers' own greedy ids, left-padded and never ended, and their fp32 logits ``[rows, steps, vocab]``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, width:].tolist(), torch.stack(out.logits, dim=1).float()
