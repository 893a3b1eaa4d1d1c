"""A finished run made into something others can use: merged, written, certified in a fresh process, described."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlab.certify import certify_apart, load_as_trained
from lmlab.export.card import CardFacts, model_card
from lmlab.export.certificate import NAME, file_hashes
from lmlab.export.directory import check_portable, check_target, made_beside, write_model, write_tokenizer
from lmlab.export.job import ExportJob
from lmlab.export.serving import Step, as_markdown, find_converter, gguf, modelfile, ollama, vllm
from lmlab.journal import RunDir, read_json, slug, write_json


@dataclass(frozen=True)
class Exported:
    """What was made: where, its certificate and the steps for other programs."""

    path: Path
    certificate: dict[str, Any]
    steps: tuple[Step, ...]


def export(
    job: ExportJob,
    to: Path,
    *,
    overwrite: bool = False,
    licence: Mapping[str, str] | None = None,
    languages: tuple[str, ...] = (),
    want: frozenset[str] = frozenset(),
    say: Callable[[str], None] = print,
) -> Exported:
    """Merge, write, certify, describe; only a certified export (or a reported one, of ``original``) gets its name.

    Args:
        licence: ``license``, ``license_name``, ``license_link`` for the card.
        want: ``gguf``, ``ollama``: steps to run where their tools are installed.

    Raises:
        UserError: what cannot be exported, or differs from what was trained by more than the fixed bound.
    """
    folder = job.check()
    run = RunDir(job.run)
    check_target(to, run=run.path, overwrite=overwrite)
    if "gguf" in want and not job.adapter_only:
        find_converter()  # a wrong $LLAMA_CPP is refused now, and not after the merge
    name = slug(to.resolve().name)
    kind = "adapter" if job.adapter_only else "full" if folder.name == "model" else "merged"
    with made_beside(to) as made:
        info, base = _write(job, folder, made, say)
        say("comparing the export with the run, in a fresh process")
        certificate = certify_apart(job, made)
        steps = _steps(job, made, name=name, kind=kind, base=base, info=info, want=want)
        facts = CardFacts(
            title=name,
            kind=kind,
            base=base,
            base_on_hub=base is not None and _on_hub(base, job, folder),
            config=_config(run),
            info=read_json(run.info),
            summary=read_json(run.summary),
            data_report=read_json(run.data_report),
            weights_info=info,
            certificate=certificate,
            best=job.best,
            licence=licence or {},
            languages=languages,
            serving=as_markdown(steps),
        )
        (made / "README.md").write_text(model_card(facts), encoding="utf-8")
        base_path = read_json(folder / "lmlab.json").get("base") or ""
        local = base_path if os.path.isabs(base_path) else ""
        places = (run.path, run.path.resolve(), made, to.absolute(), to.resolve())
        check_portable(made, {local, *map(str, places)})
        certificate["files"] = file_hashes(made)
        write_json(made / NAME, certificate, sync=True)
    _keep_copy(run, to, certificate, say)
    return Exported(to, certificate, tuple(steps))


def _config(run: RunDir) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(run.config.read_text(encoding="utf-8"))


def copy_name(to: Path) -> str:
    """The name of a certificate beside its run: two exports in directories of one name have two."""
    place = to.resolve()
    return f"{slug(place.name)}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}.json"


def _keep_copy(run: RunDir, to: Path, certificate: dict[str, Any], say: Callable[[str], None]) -> None:
    """The certificate beside the run, in exports/."""
    kept = run.path / "exports"
    try:
        kept.mkdir(exist_ok=True)
        write_json(kept / copy_name(to), certificate)
    except OSError as error:
        say(f"the certificate is in the export alone: {kept} cannot be written ({error.strerror})")


# --- what is written -------------------------------------------------------------------------------------------------


def _write(
    job: ExportJob, folder: Path, made: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], str | None]:
    """Weights, configs and tokenizer into ``made``; (what lmlab.json there holds, the base's public name)."""
    told = read_json(folder / "lmlab.json")
    base = job.base_name or public_name(told.get("base"))
    info = {
        name: told.get(name) for name in ("task", "format", "template", "chat_template", "sampler", "run")
    }
    info |= {"base": base, "quant": told.get("quant"), "weights": "best" if job.best else "last"}
    if job.adapter_only:
        info |= {"base_fingerprint": told.get("base_fingerprint"), "base_revision": told.get("base_revision")}
        return _write_adapter(job, folder, made, info, base, say), base
    from lmlab.models.merge import merged

    usable = load_as_trained(job)
    say(f"merging {job.run}" if hasattr(usable.model, "peft_config") else f"reading {job.run}")
    model: Any = merged(usable.model, dtype=_dtype(job.dtype))
    info["chat"] = _give_chat(usable.tokenizer, info, say)
    info["merged"] = {
        "base": job.base if folder.name == "adapter" else None,
        "adapters": {name: weight for name, (_, weight) in job.adapters.items()},
    }
    write_model(made, model, usable.tokenizer, eos_token_ids=usable.generator.eos_token_ids, info=info)
    stops = [usable.tokenizer.decode([token]) for token in sorted(usable.generator.eos_token_ids)]
    text = modelfile(source=".", info=info, chat_template=usable.tokenizer.chat_template, stops=stops)
    (made / "Modelfile").write_text(text, encoding="utf-8")
    return info, base


def _give_chat(tokenizer: Any, info: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """See that the tokenizer's chat template is the form of the training; whether it has one."""
    from lmlab.export.templates import use_prompt_as_chat

    if info.get("format") == "messages":
        return True
    template = info.get("template")
    if not template or info.get("task") != "sft":
        return False
    if use_prompt_as_chat(tokenizer, template):
        return True
    say("no chat template: the run's prompt template comes out differently in transformers' Jinja")
    return False


def _write_adapter(
    job: ExportJob,
    folder: Path,
    made: Path,
    info: dict[str, Any],
    base: str | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The adapter's own files, with another name for its base."""
    from lmlab.tokenizers import load_tokenizer

    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = base
    write_json(made / "adapter_config.json", config)
    shutil.copyfile(folder / "adapter_model.safetensors", made / "adapter_model.safetensors")
    tokenizer = load_tokenizer(folder)
    info["chat"] = _give_chat(tokenizer, info, say)
    write_tokenizer(made, tokenizer)
    write_json(made / "lmlab.json", info)
    return info


def public_name(source: str | None) -> str | None:
    """A base's name without a place on this machine: hub ids as they are, of a path the last part."""
    from lmlab.models.build import ASSETS, EMBEDDED

    if source is None or not os.path.isabs(source):
        return source
    path = Path(source)
    if path == (ASSETS / "tiny-base").resolve():
        return EMBEDDED.partition(":")[2]
    return path.parent.name if path.name in ("model", "base") else path.name


def _on_hub(base: str, job: ExportJob, folder: Path) -> bool:
    told = read_json(folder / "lmlab.json").get("base")
    return bool(job.base_name and "/" in base) or told == base


def _steps(
    job: ExportJob,
    made: Path,
    *,
    name: str,
    kind: str,
    base: str | None,
    info: Mapping[str, Any],
    want: frozenset[str],
) -> list[Step]:
    """GGUF, Ollama and vLLM; only what was asked for is run."""
    rank = read_json(made / "adapter_config.json").get("r")
    if kind == "adapter":
        return [vllm(name=name, kind=kind, base=base, rank=rank)]
    steps = []
    if "gguf" in want:
        steps.append(gguf(made, name=name, dtype=job.dtype))
        file = next((path.name for path in made.glob("*.gguf")), None)
        if file:
            text = (made / "Modelfile").read_text(encoding="utf-8").replace("FROM .\n", f"FROM ./{file}\n", 1)
            (made / "Modelfile").write_text(text, encoding="utf-8")
    if "ollama" in want:
        steps.append(ollama(made, name=name, has_gguf=any(made.glob("*.gguf"))))
    steps.append(vllm(name=name, kind=kind, base=base, rank=rank))
    return steps


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# --- W&B -------------------------------------------------------------------------------------------------------------


def check_artifact(job: ExportJob) -> None:
    """Refuse an artifact of a run that is not tracked, before anything is loaded.

    Raises:
        UserError: no run there, or one with ``logger.mode=disabled``.
    """
    from lmlab.tracking.artifact import mode_of

    job.check()
    mode_of(_logger(RunDir(job.run)))


def _logger(run: RunDir) -> Any:
    from lmlab.tracking.wandb import LoggerConfig

    return LoggerConfig.model_validate(_config(run)["logger"])


def log_to_wandb(
    job: ExportJob, folder: Path, name: str, certificate: Mapping[str, Any], *, say: Callable[[str], None]
) -> None:
    """The export as an artifact of the run's own W&B run: aliases latest, step-N, and best for the best weights."""
    from lmlab.tracking.artifact import log_artifact

    run = RunDir(job.run)
    summary = read_json(run.summary)
    step = summary.get("best/step") if job.best else summary.get("steps")
    aliases = ["latest", *(["best"] if job.best else []), *([f"step-{step}"] if step is not None else [])]
    told = ("verdict", "dtype", "base", "base_stored_as", "bound", "differences")
    log_artifact(
        folder,
        name=name,
        aliases=aliases,
        metadata={key: certificate.get(key) for key in told},
        config=_logger(run),
        run_dir=run.path,
        run_id=str(read_json(run.info).get("wandb_id")),
        say=say,
    )
