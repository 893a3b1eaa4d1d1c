"""The front door: compose -> validate -> prepare -> run directory -> start.

Everything a user can get wrong is found before anything is created on disk: the output place, the model's config, the
tokenizer, the vocabulary, the data. What was prepared lies in the cache, keyed by content; the run directory gets the
frozen config and the reports, and `lmlab.worker` takes it from there.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlab import ranks
from lmlab.config.compose import fingerprint, freeze, to_run_config
from lmlab.config.schema import RunConfig
from lmlab.config.shorthand import told_config_dir
from lmlab.data.chat_templates import (
    chat_renderer,
    chat_template_source,
    special_tokens,
    use_chat_template,
)
from lmlab.data.formats import Prompting
from lmlab.data.prepare import TextEncoder, prepare, training_texts
from lmlab.data.prepared import PreparedData
from lmlab.data.sources import cache_root
from lmlab.journal import RunDir, check_run_name, read_json, slug, versions_of, write_json
from lmlab.records import UserError
from lmlab.resume import branched_from, check_unchanged, goes_on
from lmlab.tracking.transcript import waiting

TRAINED = ("bpe", "chars")
"""Kinds of tokenizers that are made from the run's own training text."""
UNNAMED = (
    "run_name",
    "output_root",
    "overwrite",
    "resume",
    "hydra.",
    "logger.",
    "launcher.",
    "hparams_search",
)


@dataclass(frozen=True)
class Plan:
    """A run that can start: nothing of it is on disk yet but cached data.

    Attributes:
        config: validated, with its run_name.
        run: its directory, not made yet.
        prepared: the data set.
        tokenizer: the tokenizer's folder in the cache.
        tokenizer_hash: of what it does, wherever it lies.
    """

    config: RunConfig
    run: RunDir
    prepared: PreparedData
    tokenizer: Path
    tokenizer_hash: str


def start(composed: Any, overrides: list[str]) -> int:
    """One run from a composed config; of several nodes only its directory, and what to type on them."""
    ranks.refuse_front_door()
    config = to_run_config(composed)
    if config.hparams_search.kind != "none":
        raise UserError(
            f"hparams_search={config.hparams_search.kind} is a search over many runs",
            where="hparams_search",
            fix="add -m and what to search, as optim.lr='interval(1e-4, 1e-2)'; or hparams_search=none for one run",
        )
    with waiting("preparing the tokenizer and the data"):
        plan = plan_run(config, overrides)
    create_run(plan, overrides)
    from lmlab.worker import launch, requeue

    try:
        if config.trainer.num_nodes > 1:
            print(f"prepared for {config.trainer.num_nodes} nodes: {plan.run.path}")
            print(ranks.how_to_start(plan.run, config))
            return 0
        code = launch(plan.run, plan.config)
    finally:
        plan.run.release()
    return requeue(code)


def plan_run(config: RunConfig, overrides: Sequence[str], *, folder: Path | None = None) -> Plan:
    """The preflight.

    Args:
        folder: of the run, where a multirun decides it; else ``output_root/task/run_name``.

    Raises:
        UserError: whatever would stop the run later, if it can be known now.
    """
    if config.resume is not None and config.run_name is None:
        raise UserError(
            "resume needs the run's name", where="run_name", fix="add run_name=... of the run to go on with"
        )
    name = check_run_name(config.run_name or run_name(overrides))
    run = RunDir(folder if folder is not None else Path(config.output_root) / config.task / name)
    run.check_free(overwrite=config.overwrite, resume=goes_on(run, config))
    config = config.model_copy(update={"run_name": name})
    for callback in config.callbacks.values():
        callback.check()
    tokenizer_folder, encoder, size = prepare_tokenizer(config)
    limit = _check_model(config, size)
    _check_samplers(config, tokenizer_folder)
    prepared = prepare(config.data, encoder, task=config.task)
    _check_prompts(config, prepared.meta, encoder, limit)
    if prepared.packed:
        key = "data.cross_document_attention" if prepared.meta["stream"] else "data.packing"
        from lmlab.models.probe import require_flat

        require_flat(config.model.hf_config(size), key)
    if config.resume is not None:
        check_unchanged(run, config, data_hash=prepared.folder.name, tokenizer_hash=encoder.key)
    return Plan(config, run, prepared, tokenizer_folder, encoder.key)


def run_name(overrides: Sequence[str]) -> str:
    """A slug of the overrides and a short id, so that two starts in one second differ."""
    told = [o for o in overrides if not o.lstrip("+~").startswith(UNNAMED)]
    parts = []
    for override in told:
        key, _, value = override.lstrip("+~").partition("=")
        parts.append(f"{key.rsplit('.', 1)[-1]}={Path(value).name if '/' in value else value}")
    return f"{slug('-'.join(parts), max_length=60) if parts else 'default'}-{secrets.token_hex(3)}"


def _check_model(config: RunConfig, tokenizer_size: int) -> int | None:
    """Refuse what cannot go together; the model's context, if it has one."""
    from lmlab.models.build import context_length
    from lmlab.tokenizers.load import check_vocabulary

    hf_config = config.model.hf_config(tokenizer_size)
    limit = context_length(hf_config)
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length={config.data.max_length} is beyond the model's context of {limit}",
            where="data.max_length",
            fix=f"at most {limit}",
        )
    if config.tokenizer.kind not in TRAINED:
        tokenizer, added = _loaded_tokenizer(config)
        rows = hf_config.get_text_config().vocab_size
        check_vocabulary(tokenizer, rows, where=f"model {config.model.label}", added=added)
    config.adapter.check(hf_config, storage=config.quant.kind)
    return limit


def _check_samplers(config: RunConfig, tokenizer_folder: Path) -> None:
    """Refuse samplers of the run that its tokenizer cannot serve."""
    used = {"sampler": config.sampler}
    used |= {f"samplers.{name}": config.samplers[name] for name in config.samples.grid}
    asked = {where: sampler for where, sampler in used.items() if sampler.needs_tokenizer}
    if asked:
        from lmlab.generation.constraints import check_constraints
        from lmlab.tokenizers.load import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_folder)
        for where, sampler in asked.items():
            check_constraints(sampler, tokenizer, where=where)


def _check_prompts(
    config: RunConfig, meta: dict[str, Any], encoder: TextEncoder, context: int | None
) -> None:
    """Prompts of one's own for the sample grid must leave room for a token of the answer."""
    own = config.samples.prompts
    if context is None or isinstance(own, int):
        return
    chat = encoder.render_chat if meta["format"] == "messages" else None
    prompting = Prompting(meta["template"], chat)
    for number, question in enumerate(own):
        length = len(encoder.encode(prompting(question), add_bos=chat is None)[0])
        if length >= context:
            raise UserError(
                f"the prompt has {length} tokens and the model's context is {context}",
                where=f"samples.prompts[{number}]",
                fix=f"shorten it to at most {context - 1} tokens, so that one can follow",
            )


def _loaded_tokenizer(config: RunConfig) -> tuple[Any, list[str]]:
    """The tokenizer from the model or from disk with its added tokens, and these tokens."""
    from lmlab.tokenizers.load import add_tokens, load_tokenizer

    revision = getattr(config.model, "revision", None) if config.tokenizer.kind == "from_model" else None
    tokenizer = load_tokenizer(_tokenizer_source(config), revision=revision)
    added: list[str] = list(config.tokenizer.added_tokens)  # type: ignore[union-attr]
    if added:
        add_tokens(tokenizer, added)
    return tokenizer, added


def _tokenizer_source(config: RunConfig) -> str:
    if config.tokenizer.kind == "file":
        return str(config.tokenizer.path)  # type: ignore[attr-defined]
    source = config.model.source
    assert source is not None  # a rule of the schema: a scratch model never takes tokenizer=from_model
    return source


def prepare_tokenizer(config: RunConfig) -> tuple[Path, TextEncoder, int]:
    """Load or train the tokenizer into the cache; (its folder, the encoder for the data, the embedding rows it needs)."""
    from lmlab.tokenizers.load import load_tokenizer, rows_needed, tokenizer_hash

    named = config.data.chat_template
    template = None if named is None else chat_template_source(named)
    folder = _trained_tokenizer(config) if config.tokenizer.kind in TRAINED else None
    tokenizer = load_tokenizer(folder) if folder is not None else _loaded_tokenizer(config)[0]
    use_chat_template(tokenizer, template)
    if folder is None or template is not None:
        key = tokenizer_hash(tokenizer)
        folder = cache_root() / "tokenizers" / key[:24]
        if not folder.exists():
            _save_tokenizer(tokenizer, folder)
    return folder, text_encoder(tokenizer), rows_needed(tokenizer)


def text_encoder(tokenizer: Any) -> TextEncoder:
    """What data preparation needs of a tokenizer.

    Raises:
        UserError: it has no end-of-text token.
    """
    from lmlab.tokenizers.fast import FastEncoder
    from lmlab.tokenizers.load import adds_bos, encode_document, tokenizer_hash

    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token",
            where="tokenizer",
            fix="set eos_token in its tokenizer_config.json",
        )
    has_bos = adds_bos(tokenizer)

    def encode(text: str, *, add_bos: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        return encode_document(tokenizer, text, add_bos=has_bos and add_bos)

    @functools.cache
    def fast() -> FastEncoder:
        return FastEncoder(
            tokenizer
        )  # checks itself against the library, so it is made once and only if needed

    return TextEncoder(
        encode=encode,
        encode_long=lambda pieces: fast().document_stream(pieces),
        decode=lambda ids: str(tokenizer.decode(ids)),
        eos_token_id=int(tokenizer.eos_token_id),
        vocab_size=1 + max(tokenizer.get_vocab().values()),  # a vocabulary may have gaps
        key=tokenizer_hash(tokenizer),
        text_key=tokenizer_hash(tokenizer, with_chat=False),
        render_chat=chat_renderer(tokenizer),
        special_tokens=special_tokens(tokenizer),
    )


def _trained_tokenizer(config: RunConfig) -> Path:
    """A tokenizer trained on the training split, once per content and settings."""
    from lmlab.tokenizers import train_bpe, train_chars

    kind = config.tokenizer.kind
    settings = config.tokenizer.model_dump(exclude={"kind"})
    data = config.data.model_dump(
        mode="json", exclude={"max_length", "packing", "too_long", "path", "chat_template"}
    )
    parts = [settings, data, config.data.content_key(), config.data.format_for(config.task), config.task]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    folder = cache_root() / "tokenizers" / f"{kind}-{key[:24]}"
    if not folder.exists():
        train = train_chars if kind == "chars" else train_bpe
        _save_tokenizer(train(training_texts(config.data, task=config.task), **settings), folder)
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster with the same content
        shutil.rmtree(temporary, ignore_errors=True)


def create_run(plan: Plan, overrides: Sequence[str]) -> None:
    """Make, lock and fill the run's directory; config.yaml comes last and marks it as complete."""
    run, config = plan.run, plan.config
    run.create(overwrite=config.overwrite, resume=goes_on(run, config))
    shutil.copytree(plan.tokenizer, run.tokenizer, dirs_exist_ok=True)
    write_json(run.data_report, plan.prepared.meta["report"])
    shutil.copyfile(plan.prepared.folder / "mask_preview.txt", run.mask_preview)
    shutil.copyfile(plan.prepared.folder / "mask_preview.json", run.mask_preview_json)
    write_json(
        run.info,
        {
            "run_name": config.run_name,
            "argv": [Path(sys.argv[0]).name, *overrides],
            "flags": told_config_dir(sys.argv[1:]),
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seed": config.seed,
            "config_hash": fingerprint(config),
            "data_hash": plan.prepared.folder.name,
            "tokenizer_hash": plan.tokenizer_hash,
            "prepared": str(plan.prepared.folder),
            **_branch(run, config),
            # Drawn once and kept: a resumed run goes on in its own W&B run, an overwritten one gets a new one.
            "wandb_id": (read_json(run.info).get("wandb_id") if config.resume else None)
            or secrets.token_hex(6),
            **_git(),
            **_environment(),
        },
    )
    freeze(run, config)


def _branch(run: RunDir, config: RunConfig) -> dict[str, str]:
    """``branched_from``: the checkpoint of another run that this one began at, kept when it is gone on with."""
    if branched_from(run, config) is None:
        return {}
    known = str(read_json(run.info).get("branched_from"))
    return {"branched_from": known if config.resume == "auto" else str(Path(str(config.resume)).absolute())}


def _git() -> dict[str, Any]:
    """Commit of the lmlab that runs, and a hash of what differs from it; empty outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout

    try:
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_diff_hash": None}
    return {
        "git_commit": commit,
        "git_diff_hash": hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else None,
    }


def _environment() -> dict[str, Any]:
    """Versions and hardware for run.json; nothing from the environment variables."""
    import torch

    packages = (
        "lightning",
        "hydra-core",
        "omegaconf",
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "wandb",
        "torchmetrics",
        "pydantic",
        "datasets",
        "tokenizers",
    )
    return {
        "versions": {"python": platform.python_version(), **versions_of(*packages)},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),  # until the worker says how many it has
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
