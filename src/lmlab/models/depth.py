"""A model of many layers told from the same model with 3 and with 4 of them; see `plan`."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Moments = dict[tuple[str, str], Counter[str]]
"""(phase, moment in it) -> bytes by kind."""


def extended(short: Moments, longer: Moments, times: int) -> Moments:
    """``times`` more layers than in ``short``, of which ``longer`` has one more."""
    deep: Moments = {}
    for moment in short.keys() & longer.keys():
        low, high = short[moment], longer[moment]
        # Counter's own minus would drop what is negative.
        deep[moment] = Counter(
            {kind: low[kind] + times * (high[kind] - low[kind]) for kind in low.keys() | high.keys()}
        )
    return deep


def num_layers(config: PretrainedConfig) -> int | None:
    """Decoder layers, None where a config has no such field."""
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def alike(config: PretrainedConfig) -> bool:
    """Whether the layers are of one kind, as far as a config tells; sliding windows change no sizes worth counting."""
    text = config.get_text_config()
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    mixed = ("first_k_dense_replace", "mlp_only_layers", "attn_layer_indices", "layers_block_type")
    return kinds <= {"full_attention", "sliding_attention", "chunked_attention"} and not any(
        getattr(text, name, None) for name in mixed
    )


def with_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """The same config but for ``count`` layers, the first ones."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    text.num_hidden_layers = count
    if types:
        text.layer_types = list(types[:count])
    return config
