"""Where config meets model: build, quantize and adapt a run's model, save its weights (`load` brings them back).

The one place that knows the order (build -> load weights -> quantize -> adapt) and what lies beside saved weights
(`lmlab.json`: template, quantization, the base's fingerprint), so that training and scripts cannot disagree on it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.schema import optim_in_force
from lmlab.data.chat import end_mark
from lmlab.data.chat_templates import chat_renderer, special_tokens, use_chat_template
from lmlab.data.formats import Prompting
from lmlab.data.prepared import PreparedData
from lmlab.journal import RunDir, beside, publish_folder, read_json, write_json
from lmlab.modes import is_sharded

if TYPE_CHECKING:
    from lmlab.config.schema import RunConfig
    from lmlab.generation.text import TextGenerator
    from lmlab.models.hardware import Hardware
    from lmlab.models.memory import MemoryMeter
    from lmlab.models.quantize import QuantConfig
    from lmlab.training.options import OptimConfig


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train and what goes with it.

    Attributes:
        flat: whether it takes flat rows (packed attention).
        optim: the optimizer's config in force.
        prompting: from a question of one's own to what the model is given.
        save_weights: writes ``adapter/`` or ``model/`` into the folder it is given, of the weights it is given or its own.
        figures: parameters and stored bits, for summary.json.
        policy: (what, choice) of all that follows from the machine, for the table at the start.
    """

    model: Any
    flat: bool
    optim: OptimConfig
    generator: TextGenerator
    prompting: Prompting
    save_weights: Callable[[Path, dict[str, Any] | None], None]
    figures: dict[str, Any]
    policy: list[tuple[str, str]]


def build_for_training(
    run: RunDir,
    config: RunConfig,
    hardware: Hardware,
    *,
    wants_flat: bool,
    meter: MemoryMeter,
    say: Callable[[str], None],
) -> BuiltModel:
    """Build -> load weights -> quantize -> adapt, on this rank's own device."""
    from transformers.utils.logging import disable_progress_bar

    from lmlab.models.adapters import count_parameters
    from lmlab.models.attention import use_packed_attention
    from lmlab.models.build import compile_layers
    from lmlab.models.probe import supports_flat
    from lmlab.tokenizers import load_tokenizer, rows_needed

    meter.start("load")
    disable_progress_bar()  # one bar is enough: the run's own
    tokenizer = load_tokenizer(run.tokenizer)
    hf_config = config.model.hf_config(rows_needed(tokenizer), eos_token_id=eos_id(tokenizer))
    model, base_path, fingerprint, figures = _build_base(run, config, hf_config, tokenizer, hardware, say)
    standard = str(model.config._attn_implementation)
    generation_config = getattr(model, "generation_config", None)
    for remark in config.adapter.remarks(model):
        say(remark)
    model = config.adapter.apply(model, seed=config.seed, **_token_rows(config, tokenizer))
    flat = wants_flat and supports_flat(hf_config)
    if flat:
        use_packed_attention(model)
    total, trainable = count_parameters(model)
    figures.update({"model/params_total": total, "model/params_trainable": trainable})
    model.to(_home(config, hardware))
    model.train()  # from_pretrained returns it in eval mode, and Lightning leaves modes alone: dropout would never act
    if config.trainer.compile and not compile_layers(model):
        say("trainer.compile=true changes nothing: no decoder layers were found in this model")
    meter.start(None)
    info = weights_info(run, config, tokenizer, base_path=base_path, fingerprint=fingerprint)
    prompting = prompting_of(info, tokenizer)
    generator = text_generator(model, tokenizer, hardware, generation_config, standard, prompting)
    if prompting.render_chat is not None and generation_config is not None:
        # A full model's is saved with it: others stop there too.
        generation_config.eos_token_id = sorted(generator.eos_token_ids)
    optim = optim_in_force(config, hardware.device.type)
    if optim is not config.optim:
        say(PAGED)
    return BuiltModel(
        model,
        flat=flat,
        optim=optim,
        generator=generator,
        prompting=prompting,
        save_weights=lambda folder, weights=None: save_weights(
            model, tokenizer, folder, base_path=base_path, info=info, weights=weights
        ),
        figures=figures,
        policy=_policy(config, hardware, model, flat=flat, optimizer=optim.name),
    )


PAGED = "adapter=qlora on a GPU: paged 8-bit AdamW in place of AdamW (optim.name=adamw8bit or sgd to choose another)"


def _policy(
    config: RunConfig, hardware: Hardware, model: Any, *, flat: bool, optimizer: str
) -> list[tuple[str, str]]:
    """What follows from the machine, for the table at the start."""
    from lmlab.models.head import in_chunks

    return hardware.table(
        flat=flat,
        checkpointing=config.model.gradient_checkpointing,
        compiled=config.trainer.compile,
        optimizer=optimizer,
        chunked=in_chunks(model),
        adapter=config.adapter.kind,
    )


def _build_base(
    run: RunDir,
    config: RunConfig,
    hf_config: Any,
    tokenizer: Any,
    hardware: Hardware,
    say: Callable[[str], None],
) -> tuple[Any, str | None, dict[str, str] | None, dict[str, Any]]:
    """Build -> load weights -> quantize; (model, where its base can be found again, fingerprint, stored bytes and bits)."""
    from lmlab.models.build import build_model
    from lmlab.models.fused import use_fused_layers
    from lmlab.models.quantize import linear_storage, load_dtype, stored_bytes

    dtype = load_dtype(config.quant, hardware.compute_dtype, mixed=hardware.mixed)
    model = build_model(
        config.model, hf_config, seed=config.seed, dtype=dtype, device=_home(config, hardware)
    )
    base_path, fingerprint = _freeze_base(run, config, model, tokenizer, hardware, say)
    storage = linear_storage(model)
    params = sum(layer.shape[0] * layer.shape[1] for layer in storage)
    figures = {
        "model/base_bytes": stored_bytes(model),
        "model/base_bits_per_param": sum(layer.bits for layer in storage) / max(1, params),
    }
    use_fused_layers(model, compiled=config.trainer.compile)
    return model, base_path, fingerprint, figures


def _home(config: RunConfig, hardware: Hardware) -> Any:
    """Where the whole model lies: for FSDP in host memory, as the device need not have room for it."""
    return "cpu" if config.trainer.strategy == "fsdp" else hardware.device


def _freeze_base(
    run: RunDir, config: RunConfig, model: Any, tokenizer: Any, hardware: Hardware, say: Callable[[str], None]
) -> tuple[str | None, dict[str, str] | None]:
    """Quantize a base that an adapter will lie on; (where it can be found again, its fingerprint)."""
    from lmlab.config.schema import mixed_precision_instead
    from lmlab.models.build import Scratch, base_fingerprint
    from lmlab.models.vocabulary import grow_embeddings
    from lmlab.tokenizers import rows_needed

    # Of the base as it lies on disk: whoever loads the adapter makes room for its tokens again.
    fingerprint = base_fingerprint(model) if config.adapter.freezes_base else None
    grown = grow_embeddings(model, rows_needed(tokenizer), seed=config.seed)
    added = getattr(config.tokenizer, "added_tokens", [])
    if added:
        where = "the embedding (the head is tied to it)" if _is_tied(model) else "the embedding and the head"
        say(f"added tokens: {' '.join(added)}; {grown} new rows in {where}, the rows of all are trained")
    if not config.adapter.freezes_base:
        if mixed_precision_instead(config):
            kind, precision = config.quant.kind, hardware.precision
            say(f"adapter=none with quant={kind} trains fp32 weights in {precision} mixed precision")
        return config.model.source, None
    base_path = config.model.source
    if isinstance(config.model, Scratch):
        # An adapter is worth nothing without the base it was trained on.
        base_path = str(run.base)
        if int(os.environ.get("RANK", "0")) == 0:
            model.save_pretrained(run.base)
            tokenizer.save_pretrained(run.base)
    store_base(model, config.quant, hardware)
    return base_path, fingerprint


def store_base(model: Any, quant: QuantConfig, hardware: Hardware) -> None:
    """The frozen base as ``quant`` stores it; the rest of it in the compute type where that is 16 bits throughout."""
    from lmlab.models.hardware import move_rest_to

    quant.apply(model, compute_dtype=hardware.compute_dtype)
    if not hardware.mixed:
        move_rest_to(model, hardware.compute_dtype)


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _token_rows(config: RunConfig, tokenizer: Any) -> dict[str, list[int]]:
    """The adapter's argument for `tokenizer.added_tokens`, {} without any (an adapter need not know of them)."""
    added = getattr(config.tokenizer, "added_tokens", [])
    return {"token_rows": tokenizer.convert_tokens_to_ids(list(added))} if added else {}


def eos_id(tokenizer: Any) -> int | None:
    """The tokenizer's end-of-text id; transformers types it loosely."""
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _stop_ids(tokenizer: Any, generation_config: Any, prompting: Prompting) -> set[int]:
    """Whatever ends a text: the tokenizer's EOS, those of the model's generation config, a chat template's end mark."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    mark = end_mark(prompting.render_chat) if prompting.render_chat is not None else ""
    if mark in special_tokens(tokenizer):
        ids.add(tokenizer.convert_tokens_to_ids(mark))
    return {int(i) for i in (eos_id(tokenizer), *ids) if i is not None}


def prompting_of(info: dict[str, Any], tokenizer: Any) -> Prompting:
    """As the weights of ``info`` (lmlab.json) were trained; {} for those of others, which take a text as it is."""
    chat = info.get("format") == "messages"
    if chat:
        use_chat_template(tokenizer, info.get("chat_template"))
    return Prompting(info.get("template"), chat_renderer(tokenizer) if chat else None)


def text_generator(
    model: Any, tokenizer: Any, hardware: Hardware, generation_config: Any, attn: str, prompting: Prompting
) -> TextGenerator:
    """What continues prompts with ``model``, under its standard attention ``attn`` and in the hardware's precision."""

    from lmlab.generation.text import TextGenerator
    from lmlab.models.attention import attention
    from lmlab.models.decoding import ready_to_decode
    from lmlab.tokenizers import adds_bos, encode_document

    # As in training: of a conversation the chat template writes BOS.
    chat = prompting.render_chat
    add_bos = adds_bos(tokenizer) and chat is None
    mark = end_mark(chat) if chat is not None else ""

    @contextmanager
    def around(num_steps: int = 1) -> Any:
        with ExitStack() as stack:
            stack.enter_context(attention(model, attn))
            if is_sharded(model):  # no rank has the weights that would be merged
                from lmlab.models.sharding import same_logits

                stack.enter_context(same_logits(model))
            else:
                stack.enter_context(
                    ready_to_decode(model, compute_dtype=hardware.compute_dtype, num_steps=num_steps)
                )
            stack.enter_context(hardware.computing())
            yield

    return TextGenerator(
        model,
        encode=lambda text: list(encode_document(tokenizer, text, add_bos=add_bos)[0]),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        eos_token_ids=_stop_ids(tokenizer, generation_config, prompting),
        around=around,
        tokenizer=tokenizer,
        end_mark=mark,  # of several tokens it is no stop id: EOS follows it, and it is text until then
    )


def weights_info(
    run: RunDir,
    config: RunConfig,
    tokenizer: Any,
    *,
    base_path: str | None,
    fingerprint: dict[str, str] | None,
) -> dict[str, Any]:
    """What stands in lmlab.json beside saved weights: enough to use them as they were trained."""
    meta = PreparedData.load(Path(read_json(run.info)["prepared"])).meta
    return {
        "task": config.task,
        "format": meta["format"],
        "template": meta["template"],
        "chat_template": tokenizer.chat_template if meta["format"] == "messages" else None,
        "base": base_path,
        "base_revision": getattr(config.model, "revision", None),
        "base_fingerprint": fingerprint,
        "quant": config.quant.model_dump(mode="json"),
        "sampler": config.sampler.model_dump(mode="json"),
        "run": run.path.name,
    }


def save_weights(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    base_path: str | None,
    info: dict[str, Any],
    weights: dict[str, Any] | None = None,
) -> None:
    """``folder/adapter`` (loads with PEFT alone) or ``folder/model`` (loads with transformers alone), by rename.

    Args:
        weights: the state dict to write, where the model itself has a share of each tensor only.

    Raises:
        OSError: they cannot be written; what stood there before stands there still.
    """
    from safetensors import SafetensorError

    is_adapter = hasattr(model, "peft_config")
    target = folder / ("adapter" if is_adapter else "model")
    temporary = beside(target, "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if is_adapter:
            for peft_config in model.peft_config.values():
                peft_config.base_model_name_or_path = base_path
                peft_config.revision = info["base_revision"]
            model.save_pretrained(temporary, save_embedding_layers=False, state_dict=weights)
        else:
            model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "lmlab.json", info, sync=True)
        publish_folder(temporary, target)
    except SafetensorError as error:  # how that library says that the disk is full
        raise OSError(errno.EIO, str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sample_prompts(config: RunConfig, prepared: PreparedData, built: BuiltModel) -> list[tuple[str, str]]:
    """(what a person reads, what the model is given) for the sample grid; own prompts go through the template."""
    chosen, prompting = config.samples.prompts, built.prompting
    if isinstance(chosen, int):
        asked = prepared.meta["val_prompts"]
        # Spread over the split: neighbours often come from one group and look alike.
        count = min(chosen, len(asked))
        picked = [_fitting(asked[i * len(asked) // count]["prompt"], built) for i in range(count)]
        return [(_shown(prompt, prompting), prompt) for prompt in picked]
    return [(text, prompting(text)) for text in chosen]


def _fitting(prompt: str, built: BuiltModel) -> str:
    """The beginning of a text's first words that leaves room in a very short context."""
    from lmlab.generation.decode import context_length

    limit = context_length(built.model)
    while limit is not None and len(prompt) > 1 and len(built.generator.encode(prompt)) >= limit:
        prompt = prompt[: len(prompt) // 2]
    return prompt


MARKS = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def _shown(prompt: str, prompting: Prompting) -> str:
    """A prompt without its template's headings and marks, for tables."""
    if prompting.render_chat is not None:
        lines = [line for line in MARKS.sub("\n", prompt).splitlines() if line.strip()]
    elif prompting.template is not None:
        headings = ("### ", "Below is")
        lines = [line for line in prompt.splitlines() if line.strip() and not line.startswith(headings)]
    else:
        return prompt
    return "\n".join(lines) or prompt
