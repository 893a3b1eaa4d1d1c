"""What is trained: everything (none), or low-rank updates over a frozen base (lora, qlora), through PEFT.

LoRA: Hu et al. 2021, arXiv 2106.09685 (y = Wx + (alpha / r) B A x, A random, B zero). QLoRA is LoRA over a 4-bit
base with an 8-bit paged optimizer (arXiv 2305.14314). rsLoRA (2312.03732) and DoRA (2402.09353) are settings of it. Files are PEFT's own and load with PEFT alone; beside them lies
``lmlab.json`` with what PEFT does not record: the base's fingerprint, its quantization and the prompt template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lmlab.models.targets import ALL_LINEAR, outside, target_paths, tied_paths, whole_paths
from lmlab.records import UserError
from lmlab.registry import Config, adapters

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PEFT_TIES = {"embed_tokens", "lm_head"}
"""Names by which PEFT knows that a module is tied; under others it would split the matrix."""


class AdapterConfig(Config):
    """Turns a base model into the model that is trained."""

    kind: str

    @property
    def freezes_base(self) -> bool:
        """Whether the base stays as it is (then it may be stored in few bits)."""
        return True

    @property
    def same_in_all_layers(self) -> bool:
        """Whether every decoder layer is adapted alike, so that a few tell what all take."""
        return True

    def check(self, hf_config: PretrainedConfig, *, storage: str) -> None:
        """Refuse what this model cannot take, by its config alone; ``storage`` is the base's (``quant.kind``).

        Raises:
            UserError: whatever `apply` would refuse and a config can tell.
        """

    def remarks(self, model: PreTrainedModel) -> list[str]:
        """What to tell whoever started the run about this adapter on this model, before `apply`."""
        return []

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> Any:
        """The model to train; its trainable parameters are those with ``requires_grad``.

        Args:
            token_rows: ids of added tokens, whose rows of the embedding and of the head must be trained; left out
                where there are none.
        """
        raise NotImplementedError


@adapters.register
class NoAdapter(AdapterConfig):
    """Full training: every parameter of the base."""

    kind: Literal["none"]

    @property
    def freezes_base(self) -> bool:
        return False

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> PreTrainedModel:
        model.requires_grad_(True)
        return model


@adapters.register
class Lora(AdapterConfig):
    """Low-rank adapters by PEFT.

    The fields from ``rslora`` on came later: their defaults are for configs frozen before, the YAML files have them all.

    Attributes:
        rank: r, the inner dimension of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input, while training.
        target_modules: ``all-linear`` (every linear layer but the head), a list of names or ends of paths, or a regular
            expression for whole paths.
        exclude_modules: names or an expression of layers to leave out again.
        layers: numbers of the decoder layers that get updates, negative ones counted from the end; null: all.
        rslora: scale by alpha / sqrt(rank), so that high ranks learn as fast (arXiv 2312.03732).
        dora: learn the length of each output's weight row apart from its direction (arXiv 2402.09353).
        modules_to_save: names of modules that are trained whole and saved with the adapter. Of a head that is tied to
            the embedding, either name means the one matrix: it is trained, and the two stay tied.
        init: of A; ``gaussian`` draws from N(0, 1 / rank), the default is PEFT's uniform one. B is zero.
    """

    kind: Literal["lora", "qlora"]
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    target_modules: str | list[str]
    exclude_modules: str | list[str] = Field(default=[])
    layers: list[int] | None = Field(default=None)
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = Field(default=[])
    init: Literal["default", "gaussian"] = "default"

    @property
    def same_in_all_layers(self) -> bool:
        named = f"{self.target_modules} {self.exclude_modules} {self.modules_to_save}"
        return self.layers is None and re.search(r"\d", named) is None

    def check(self, hf_config: PretrainedConfig, *, storage: str) -> None:
        if self.target_modules == ALL_LINEAR and not (
            self.exclude_modules or self.layers is not None or self.modules_to_save
        ):
            return
        model = model_without_weights(hf_config)
        if model is not None:
            self._places(model, storage=storage)

    def remarks(self, model: PreTrainedModel) -> list[str]:
        _, whole, tied = self._places(model)
        said = []
        targets = self._targets(model)
        if inside := len(targets) - len(outside(targets, whole)):
            said.append(
                f"adapter.modules_to_save: {inside} of {len(targets)} target layers are trained whole and get no update"
            )
        if not tied:
            return said
        return [
            *said,
            f"adapter.modules_to_save: {' and '.join(whole)} are one matrix in this model; it is trained and stays one",
        ]

    def apply(self, model: PreTrainedModel, *, seed: int, token_rows: Sequence[int] = ()) -> Any:
        """Freeze the base and put adapters on it; A is drawn from ``seed``, B is zero, both in fp32.

        Over a 16-bit base PEFT rounds A to those 16 bits once; over every other storage a seed gives the same A.

        Raises:
            UserError: a name or a layer that is not in the model, ``token_rows`` of a head with a bias, or a head that
                is tied in a way that PEFT does not know.
        """
        import torch
        from peft import LoraConfig, TaskType, get_peft_model

        from lmlab.models.lora import reading_any_storage, use_fused_lora
        from lmlab.models.vocabulary import token_row_targets, use_token_rows
        from lmlab.models.whole import train_in_fp32

        targets, whole, tied = self._places(model)
        rows = token_row_targets(model, token_rows) if token_rows else {}
        rows = {
            path: ids for path, ids in rows.items() if path not in whole
        }  # whole: these rows with all others
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it, any number does
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            modules_to_save=whole or None,
            ensure_weight_tying=tied,
            init_lora_weights=True if self.init == "default" else self.init,
            task_type=TaskType.CAUSAL_LM,
            trainable_token_indices=rows or None,
        )
        with torch.random.fork_rng(devices=[]), reading_any_storage():
            torch.default_generator.manual_seed(
                seed
            )  # PEFT draws on the CPU; torch.manual_seed would reseed the GPUs
            adapted = get_peft_model(model, config)
        train_in_fp32(adapted)
        use_token_rows(adapted)
        use_fused_lora(adapted)
        return adapted

    def _targets(self, model: Any) -> list[str]:
        return target_paths(model, self.target_modules, layers=self.layers, exclude=self.exclude_modules)

    def _places(self, model: Any, *, storage: str = "none") -> tuple[str | list[str], list[str], bool]:
        """(layers that get updates as PEFT takes them, modules trained whole, whether a tied matrix is among those)."""
        targets: str | list[str] = self._targets(model)
        whole = whole_paths(model, self.modules_to_save, storage=storage) if self.modules_to_save else []
        targets = outside(targets, whole)
        if self.target_modules == ALL_LINEAR and self.layers is None and not self.exclude_modules:
            targets = ALL_LINEAR  # as it always stood in the files
        if not self.modules_to_save:
            return targets, [], False
        pair = tied_paths(model)
        if not set(pair) & set(whole):
            return targets, whole, False
        if not {path.rsplit(".", 1)[-1] for path in pair} & PEFT_TIES:
            raise UserError(
                f"modules_to_save={self.modules_to_save[0]}: {' and '.join(pair)} are one matrix, which PEFT would split",
                where="adapter.modules_to_save",
                fix="leave it out, or use adapter=none",
            )
        return targets, sorted({*whole, *pair}), True


def model_without_weights(hf_config: PretrainedConfig) -> PreTrainedModel | None:
    """The model's modules on the meta device; None where its code comes with its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(hf_config, "auto_map", None):
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def count_parameters(model: Any) -> tuple[int, int]:
    """(all, trainable) parameters; a packed weight counts its values, not its bytes."""
    import torch
    from torch import nn

    from lmlab.models.quantize import weight_shape

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = {id(m.weight): math.prod(weight_shape(m)) for m in linear if m.weight.dtype == torch.uint8}
    total = trainable = 0
    for parameter in model.parameters():
        count: int = packed.get(id(parameter)) or parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable
