"""Build a causal LM from a directory, the hub, or from scratch; nothing here quantizes or adapts.

The order is always build -> load weights -> quantize -> adapt. Checks that need no weights (does the directory
hold a model, does the vocabulary fit) work on the config alone and run before anything is created on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lmlab.hub import hub_reachable
from lmlab.records import UserError
from lmlab.registry import Config, models

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

EMBEDDED = "lmlab:tiny-base"
ASSETS = Path(__file__).resolve().parents[3] / "assets"
_ENCODERS = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
_NEVER = frozenset(["flaubert", "xlm", "xlnet"])  # listed by transformers, but not left-to-right


class ModelConfig(Config):
    """Keys every model has.

    Attributes:
        gradient_checkpointing: recompute activations in the backward pass (less memory, about a third more compute).
    """

    kind: str
    gradient_checkpointing: bool

    @property
    def label(self) -> str:
        """Short name for tags and tables."""
        raise NotImplementedError

    @property
    def source(self) -> str | None:
        """Where weights and tokenizer lie: a local directory or a hub id; None for a scratch model."""
        return None

    def hf_config(self, vocab_size: int | None, *, eos_token_id: int | None = None) -> PretrainedConfig:
        """The transformers config; size and EOS are the tokenizer's, for a model that has none of its own."""
        raise NotImplementedError


def hidden_size(config: PretrainedConfig) -> int | None:
    """Width of the residual stream, None where a config has no such field."""
    return getattr(config.get_text_config(), "hidden_size", None)


@models.register
class Pretrained(ModelConfig):
    """Any causal LM that transformers can load.

    Attributes:
        name_or_path: hub id, directory, lmlab run directory (its ``model/``), or ``lmlab:tiny-base``.
        revision: commit or tag on the hub, or null.
        trust_remote_code: run Python code that comes with the model; off unless you have read that code.
    """

    kind: Literal["pretrained"]
    name_or_path: str
    revision: str | None
    trust_remote_code: bool

    @property
    def label(self) -> str:
        return "tiny" if self.name_or_path == EMBEDDED else Path(self.name_or_path).name

    @property
    def source(self) -> str:
        return resolve_source(self.name_or_path)

    def hf_config(self, vocab_size: int | None, *, eos_token_id: int | None = None) -> PretrainedConfig:
        """The model's own config.

        Raises:
            UserError: no such directory, no config in it, not a causal LM, or a hub that does not answer.
        """
        from transformers import AutoConfig

        source = self.source
        offline = not Path(source).exists() and not hub_reachable()
        try:
            config = AutoConfig.from_pretrained(
                source,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=offline,
            )
        except (
            Exception
        ) as error:  # OSError, ValueError, KeyError, JSONDecodeError ... all mean: not loadable
            fix = (
                "check the name and the network"
                if not Path(source).exists()
                else "it needs a config.json that transformers knows"
            )
            if offline:
                raise UserError(
                    f"model '{self.name_or_path}' is not cached, and the hub cannot be reached",
                    where="model.name_or_path",
                    fix="give a directory, or connect once; its shape alone needs no hub: model=scratch/...",
                ) from error
            detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UserError(
                f"model '{self.name_or_path}' has no usable config: {detail}",
                where="model.name_or_path",
                fix=fix,
            ) from error
        if not self.trust_remote_code:
            _require_causal(config, where="model.name_or_path")
        return config


@models.register
class Scratch(ModelConfig):
    """A randomly initialised model of a transformers architecture.

    Attributes:
        name: the preset's name, for tags and tables.
        architecture: transformers' model_type (llama, gpt2, ...).
        config: that architecture's own config values; vocab_size and special ids come from the tokenizer.
    """

    kind: Literal["scratch"]
    name: str
    architecture: str
    config: dict[str, Any]

    @property
    def label(self) -> str:
        return self.name

    def hf_config(self, vocab_size: int | None, *, eos_token_id: int | None = None) -> PretrainedConfig:
        """The config with the tokenizer's vocabulary size.

        Raises:
            UserError: unknown architecture, one that is no causal LM, or values it does not take.
        """
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if self.architecture not in CONFIG_MAPPING:
            from lmlab.registry import suggest

            near = suggest(self.architecture, CONFIG_MAPPING.keys()).split("? ")[0]
            raise UserError(
                f"unknown architecture '{self.architecture}'", where="model.architecture", fix=near[:80]
            )
        values = dict(self.config)
        if vocab_size is not None:
            values["vocab_size"] = vocab_size
        # An architecture's default ids (Llama: 1 and 2) mean other tokens in a vocabulary trained here.
        values.update(bos_token_id=None, eos_token_id=eos_token_id)
        try:
            config = AutoConfig.for_model(self.architecture, **values)
        except Exception as error:
            raise UserError(
                f"{self.architecture} refuses this config: {error}",
                where="model.config",
                fix="mend the values",
            ) from error
        _require_causal(config, where="model.architecture")
        return config


def _require_causal(config: PretrainedConfig, *, where: str) -> None:
    """Refuse what sees the token it must predict.

    transformers lists BERT and its kin as causal LMs too, but they are causal only with ``is_decoder``; trained
    without, their loss falls to nothing because each position sees its own label.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    encoder = config.model_type in _ENCODERS and not getattr(config, "is_decoder", False)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or _is_registered(config)
    if not known or config.model_type in _NEVER or encoder:
        raise UserError(
            f"'{config.model_type}' is not a causal language model"
            + (" without is_decoder" if encoder else ""),
            where=where,
            fix="choose one that is",
        )


def _is_registered(config: PretrainedConfig) -> bool:
    """Whether a plugin has given this config's class a model by `AutoModelForCausalLM.register`."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def resolve_source(name_or_path: str) -> str:
    """A directory's absolute path, or the hub id as it is.

    Raises:
        UserError: it looks like a local path and is not there, or is a directory without a model.
    """
    if name_or_path == EMBEDDED:
        path = ASSETS / "tiny-base"
    else:
        path = Path(name_or_path).expanduser()
        looks_local = name_or_path.startswith((".", "/", "~")) or path.exists() or len(path.parts) > 2
        if not looks_local:
            return name_or_path
    if not path.is_dir():
        raise UserError(
            f"no such model directory: {name_or_path}",
            where="model.name_or_path",
            fix="give a directory or a hub id",
        )
    if not (path / "config.json").is_file():
        if (path / "model" / "config.json").is_file():
            path = path / "model"
        elif (path / "adapter_config.json").is_file() or (path / "adapter").is_dir():
            raise UserError(
                f"{name_or_path} holds an adapter, not a model",
                where="model.name_or_path",
                fix="name its base, or export it merged first",
            )
        else:
            raise UserError(
                f"no config.json in {name_or_path}",
                where="model.name_or_path",
                fix="give a directory in Hugging Face layout",
            )
    return str(path.resolve())


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model's positions reach, or None where it has no such limit."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def build_model(
    model_config: ModelConfig,
    hf_config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Weights in memory: loaded from the source, or drawn from ``seed`` for a scratch model.

    Args:
        dtype: floating type of all weights after loading.
        device: where they go; under DDP each rank passes its own (never a device_map).

    Raises:
        UserError: no safetensors there, a damaged file, or weights that are not (all) this architecture's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any
    if isinstance(model_config, Pretrained):
        model = _load_weights(model_config, hf_config, dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
            model = AutoModelForCausalLM.from_config(hf_config).to(dtype)
    model.to(device)
    if model_config.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _load_weights(about: Pretrained, hf_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    def refuse(detail: str) -> UserError:
        return UserError(
            f"weights of '{about.name_or_path}' cannot be loaded: {detail}",
            where="model.name_or_path",
            fix="it needs whole model*.safetensors of this architecture (pickle files are not opened)",
        )

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            about.source,
            config=hf_config,
            revision=about.revision,
            trust_remote_code=about.trust_remote_code,
            dtype=dtype,
            attn_implementation=standard_attention(hf_config),
            use_safetensors=True,  # never unpickle a downloaded file
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise refuse(str(error).strip().splitlines()[0][:200]) from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would draw them at random and only log it
        missing = sorted(report["missing_keys"])
        raise refuse(f"{len(missing)} tensors are missing, {missing[0]} the first")
    return model


def standard_attention(config: PretrainedConfig) -> str | None:
    """SDPA, or None (transformers' choice) for Gemma 2 and gpt-oss, whose soft-capping and sinks SDPA cannot do."""
    return None if config.model_type in ("gemma2", "gpt_oss") else "sdpa"


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Non-reentrant checkpointing: works with frozen embeddings and under DDP (`use_reentrant=True` does neither)."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def decoder_layers(model: PreTrainedModel, count: int | None) -> Sequence[nn.Module]:
    """The decoder's ``count`` layers in order; empty where they cannot be told."""
    from torch.nn import ModuleList

    lists = (m for m in model.modules() if isinstance(m, ModuleList) and len(m) == count)
    return list(next(lists, ()))


def compile_layers(model: Any) -> int:
    """torch.compile each decoder layer by itself, in place; how many. Names of parameters stay as they are.

    One graph serves all layers of a kind (compiled once), lengths are dynamic, and head, loss and the gathering of
    documents stay outside, where shapes follow the data.
    """
    from torch import nn

    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "self_attn")
    ]
    lists += [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "attn")]
    for layer in (layer for layers in lists for layer in layers):
        layer.compile(dynamic=True)
    return sum(map(len, lists))


def base_fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """What an adapter remembers of its base: a hash of the config and of the weights, before quantization.

    Of every parameter about 4,096 values evenly spread enter the hash, so that a base with an adapter merged into
    it (same embeddings, same norms) is another base.
    """
    digest = hashlib.sha256()
    for parameter in model.parameters():
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 4096)]
        # Rounded to bf16, as a base may be loaded in it: the same base on every machine.
        digest.update(values.bfloat16().float().cpu().numpy().tobytes())
    config = json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str)
    return {
        "config": hashlib.sha256(config.encode()).hexdigest()[:16],
        "tensors": digest.hexdigest()[:16],
    }


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Config values that saving and loading again leave alone, at every depth."""
    passing = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
    return {k: _lasting(v) if isinstance(v, dict) else v for k, v in config.items() if k not in passing}
