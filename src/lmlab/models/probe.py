"""Whether an architecture keeps the documents of a flat row apart: tried out, not looked up.

A tiny random twin of the config (a few layers, narrow, a window of 4, a soft-cap of 2) runs five documents in one
flat row under packed attention and each alone under transformers' eager attention. Accepted is who gives the same
logits, calls the packed attention once per layer, and does not move the other documents by a single bit when one
changes (but for the rounding of experts, see `_apart`). The checkpoint itself would prove nothing: thirteen tokens
never reach a window of 4096, so an ignored one would go unseen; in the twin all is active. About 0.2 s, once per
process and config. What it cannot see is a layer that differs from those kept by nothing in the config but its index.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lmlab.models.attention import NAME, packed_attention, register
from lmlab.models.head import own_logits
from lmlab.records import PackedBatch, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LENGTHS = (5, 9, 13, 9, 3)
MAX_DIFFERENCE = 1e-4  # relative; right ones are at 1e-6 (fp32 sums in another order), wrong ones above 1e-2
ROUNDING = 1e-5  # relative; what the number of rows in an expert's matrix may change (see `_apart`)
MAX_KINDS = 8  # of layers in one twin
MAX_PARAMETERS = 30_000_000  # of a twin; where more remain, its size is not one of the fields made small here
WINDOW, SOFTCAP = 4, 2.0
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 16,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "attn_logit_softcapping": SOFTCAP,
    # Scores of this size make soft-caps and windows matter; the values of large models would flatten a small one.
    "attention_multiplier": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_AT_MOST = {
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
}


def supports_flat(config: PretrainedConfig) -> bool:
    """Whether this architecture may be trained on flat rows; else it gets padded ones, one document each."""
    return why_not_flat(config) is None


def why_not_flat(config: PretrainedConfig) -> str | None:
    """Why flat rows would be wrong for this architecture, in one line; None where they are right."""
    return _reason(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


def require_flat(config: PretrainedConfig, key: str) -> None:
    """Refuse rows of several documents for an architecture that would let them see one another.

    Args:
        key: what asks for such rows: ``data.packing`` or ``data.cross_document_attention``.

    Raises:
        UserError: it cannot; the fix is the other value of ``key``.
    """
    if (reason := why_not_flat(config)) is not None:
        raise UserError(
            f"documents in one row cannot be kept apart in a {config.model_type} model: {reason}",
            where=key,
            fix=f"{key}={'false' if key == 'data.packing' else 'true'}",
        )


@cache
def _reason(kind: type[PretrainedConfig], content: str) -> str | None:
    try:
        original = kind.from_dict(json.loads(content))
        reason = _ruled_out(original)
        model = None if reason else _twin(original)
    except Exception as error:  # whatever a config of others may raise: then nothing is proven
        return f"a tiny twin of it cannot be built ({type(error).__name__}: {_first_line(error)})"
    if model is None:
        return reason
    try:
        return _compare(model)
    except Exception as error:
        return f"a tiny twin of it fails on flat rows ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _ruled_out(config: PretrainedConfig) -> str | None:
    """What can be told without a twin."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.sub_configs:
        return f"its config has parts of its own ({', '.join(config.sub_configs)})"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not one of transformers' own causal models"
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(architecture, "_is_stateful", False):
        return "its layers carry a state from token to token"
    if other := set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of type {', '.join(sorted(other))}"
    if not architecture._can_set_attn_implementation():
        return "its attention is not transformers' exchangeable one"
    return None


def _compare(model: PreTrainedModel | Any) -> str | None:
    """Run the twin packed and alone; the first thing that is wrong."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 97, (n,), generator=generator) for n in LENGTHS]
    others = [torch.randint(3, 97, documents[0].shape, generator=generator), *documents[1:]]
    batch = _flat_row(documents)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        alone = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents])
        alone = alone[batch.supervised_index]
        model.set_attn_implementation(NAME)
        packed, calls = _packed(model, batch)
        changed, _ = _packed(model, _flat_row(others))
    layers = model.config.num_hidden_layers
    if calls != layers:
        return f"{calls} calls of the exchangeable attention in {layers} layers"
    moved, size = (changed - packed)[_later(batch)].abs().max().item(), alone.abs().max().item()
    if moved != 0.0 and not (moved < ROUNDING * size and _apart(model, batch)):
        return f"a document changes the logits of the ones after it, by {moved:.1e}"
    difference = (packed - alone).abs().max().item() / size
    if not difference < MAX_DIFFERENCE:  # a nan is no proof either
        return f"its logits differ from those of each document alone, by {difference:.1e} of their size"
    return None


def _later(batch: PackedBatch) -> torch.Tensor:
    """Which of the supervised positions are not in the first document."""
    return batch.supervised_index >= LENGTHS[0]


def _apart(model: Any, batch: PackedBatch) -> bool:
    """Whether the logits of all later documents have a gradient of exactly 0.0 in the first one's embeddings.

    Experts get all tokens routed to them as one matrix, and a product may round otherwise with another number of
    rows: the last bits then depend on the other documents though nothing is seen of them. The gradient has no part
    in that: a path from one document to another is there or is not.
    """
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits, _ = _packed(model, batch)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[_later(batch)].square().sum(), embedded[0])
    seen = gradient[0].abs().amax(-1)
    return bool((seen[: LENGTHS[0]] == 0).all() and (seen[LENGTHS[0] :] > 0).any())


def _packed(model: Any, batch: PackedBatch) -> tuple[torch.Tensor, int]:
    """Logits ``[n, vocab]`` of the batch's supervised positions, and how often packed attention was called."""
    from transformers import AttentionInterface

    calls = 0

    def counted(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        nonlocal calls
        calls += 1
        return packed_attention(*args, **kwargs)

    AttentionInterface.register(NAME, counted)
    try:
        return own_logits(model, batch).logits, calls
    finally:
        AttentionInterface.register(NAME, packed_attention)


def _flat_row(documents: list[torch.Tensor]) -> PackedBatch:
    """The documents as training would give them to the model, every other position supervised."""
    lengths = [len(ids) for ids in documents]
    ids = torch.cat(documents)[None]
    return PackedBatch(
        input_ids=ids,
        labels=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32),
        supervised_index=torch.arange(0, ids.shape[1], 2),
        num_tokens=ids.shape[1],
    )


def _twin(original: PretrainedConfig) -> Any:
    """The tiny model, in evaluation mode: matrices N(0, 1.2 / sqrt(fan in)), so that attention is far from uniform."""
    from transformers import AutoModelForCausalLM

    register()
    config = type(original).from_dict(_twin_values(original.to_dict(), original.attribute_map))

    def build() -> Any:
        return AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float32)

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build().parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"it would have {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        model = build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.15)
    return model.eval()


def _twin_values(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The config of a tiny twin: the same kinds of layers, heads of the same width (RoPE depends on it), fewer and narrower.

    Args:
        values: of the original config, as ``to_dict`` gives them.
        names: the config class's own name of each common one (``attribute_map``).
    """

    def own(name: str) -> str:
        return names.get(name, name)

    twin = {k: v for k, v in values.items() if k not in ("quantization_config", "architectures", "auto_map")}
    _cut_layers(twin, own("num_hidden_layers"))
    heads = twin[own("num_attention_heads")]
    head_dim = values.get(own("head_dim")) or values[own("hidden_size")] // heads
    few = 4 if heads % 2 == 0 or heads > 4 else heads
    narrow: dict[str, Any] = {
        own("num_attention_heads"): few,
        own("hidden_size"): few * head_dim,
        "word_embed_proj_dim": few * head_dim,
        "query_pre_attn_scalar": head_dim // 2,  # another scale than the default
    }
    groups = values.get(own("num_key_value_heads"))
    if groups:
        narrow[own("num_key_value_heads")] = few if groups == heads else 1 if groups == 1 else few // 2
    for name, value in {**{own(k): v for k, v in _SMALL.items()}, **narrow}.items():
        if twin.get(name) is not None:
            twin[name] = value
    for name, most in _AT_MOST.items():
        if twin.get(own(name)) is not None:
            twin[own(name)] = min(twin[own(name)], most)
    for name, value in twin.items():
        if "intermediate_size" in name and value is not None:
            twin[name] = [64] * len(value) if isinstance(value, list) else 64
    return twin


def _cut_layers(twin: dict[str, Any], count: str) -> None:
    """Keep the first layer of each kind, two at least; what is given per layer is cut along."""
    layers = twin[count]
    lists = {k: v for k, v in twin.items() if isinstance(v, list) and len(v) == layers}
    overrides = {int(k): v for k, v in (twin.get("per_layer_config") or {}).items()}
    shared = layers - (twin.get("num_kv_shared_layers") or 0)
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(
            repr([layer >= shared, overrides.get(layer), *(v[layer] for v in lists.values())]), layer
        )
    if len(kinds) > MAX_KINDS:
        raise ValueError(f"{len(kinds)} kinds of layers")
    kept = sorted(kinds.values())
    if len(kept) == 1:
        kept = list(range(min(2, layers)))
    twin[count] = len(kept)
    for name, value in lists.items():
        twin[name] = [value[layer] for layer in kept]
    if overrides:
        twin["per_layer_config"] = {i: overrides[layer] for i, layer in enumerate(kept) if layer in overrides}
    if "num_kv_shared_layers" in twin:
        twin["num_kv_shared_layers"] = sum(layer >= shared for layer in kept)
