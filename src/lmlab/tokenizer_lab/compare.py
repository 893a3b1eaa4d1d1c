"""Several tokenizers trained, measured on the same held-out texts, and put on one page: ``train_tokenizer.py -m``.

Every combination is trained in this process, one after another (training a tokenizer keeps no state that could leak into
the next), through the same cache as a run's own tokenizer. What is measured and how: `lmlab.tokenizers.measure`.

Files, below ``output_root/tokenizers/NAME``: a folder per tokenizer, report.html, results.csv (a row per tokenizer and
group), results.json (all of the page).
"""

from __future__ import annotations

import datetime
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmlab.config.command_line import PLAIN_VALUE
from lmlab.config.compose import to_run_config
from lmlab.config.shorthand import told_config_dir
from lmlab.journal import check_run_name, slug
from lmlab.records import UserError
from lmlab.tokenizer_lab.options import LAB, LabConfig, lab_of, without_lab
from lmlab.tokenizer_lab.texts import held_out_groups
from lmlab.tokenizers.measure import EmbeddingCost, Measurement, measure, pieces
from lmlab.worker import patient_streams

if TYPE_CHECKING:
    from lmlab.config.schema import RunConfig

NOT_FOR_TRAINING = ("tokenizer", LAB, "run_name", "overwrite", "resume")
"""Overrides that the command of a pretraining run leaves out."""
SAID_ALONE = ("tokenizer.vocab_size", "tokenizer.pre_tokenizer", "tokenizer")
"""Swept keys whose values tell a reader enough."""


@dataclass
class Entry:
    """One tokenizer of the page.

    Attributes:
        family: the label without the size of the vocabulary: those that differ in nothing else.
        given: the path it was loaded from; None for one that is trained here.
        status: ``trained``, ``loaded`` or ``refused: reason``.
        error: why it was refused.
        command: pretrains with it; "" where there is none.
        config: the run config it was trained for; None if that is refused.
    """

    label: str
    overrides: list[str]
    family: str = ""
    given: str | None = None
    config: RunConfig | None = None
    folder: Path | None = None
    tokenizer: Any = None
    status: str = ""
    error: UserError | None = None
    command: str = ""
    seconds: float = 0.0


def make_tokenizer(config: RunConfig, folder: Path) -> Any:
    """Train the tokenizer of ``config`` (or take it from the cache), copy it to ``folder``, and load it from there.

    Raises:
        UserError: a kind that is not trained, or what training refuses.
    """
    from lmlab.start import TRAINED, prepare_tokenizer
    from lmlab.tokenizers import load_tokenizer

    if config.tokenizer.kind not in TRAINED:
        raise UserError(
            f"tokenizer={config.tokenizer.kind} is not trained", where="tokenizer", fix="use tokenizer=bpe"
        )
    cached, _, _ = prepare_tokenizer(config)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cached, folder)
    return load_tokenizer(folder)


def free_folder(output_root: str, name: str, *, overwrite: bool) -> Path:
    """``output_root/tokenizers/name``, which must not be there yet.

    Raises:
        UserError: it is, and ``overwrite`` is not asked for; or nothing can be written there.
    """
    folder = Path(output_root) / "tokenizers" / check_run_name(name)
    if folder.exists() and not overwrite:
        raise UserError(
            "this tokenizer directory already exists",
            where=str(folder),
            fix="choose another run_name, or overwrite=true",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise UserError(
            f"the output directory cannot be written to: {error.strerror}",
            where=str(folder.parent),
            fix="choose another output_root",
        ) from error
    return folder


def train_command(overrides: Sequence[str], path: str) -> str:
    """What pretrains with the tokenizer at ``path``, on the data and the model of ``overrides``."""
    kept = [o for o in overrides if o.lstrip("+~").partition("=")[0].split(".")[0] not in NOT_FOR_TRAINING]
    if not any(override.startswith("task=") for override in kept):
        kept.insert(0, "task=pretrain")
    if not PLAIN_VALUE.fullmatch(path):  # quotes for Hydra's grammar, besides those for the shell
        path = "'" + path.replace("'", "\\'") + "'"
    words = [*told_config_dir(sys.argv[1:]), *kept, "tokenizer=file", f"tokenizer.path={path}"]
    return shlex.join(["python", "train.py", *words])


# --- the comparison ---------------------------------------------------------------------------------------------------


@patient_streams()
def compare(arguments: Sequence[str], *, config_loader: Any, master: Any) -> int:
    """Train every combination of ``arguments``, measure all of them, write the page; the exit code.

    Args:
        config_loader: Hydra's, which composes each combination.
        master: the config of the command line without the swept values.

    Raises:
        UserError: a text or a tokenizer to compare with that cannot be read, or no combination that can be trained.
    """
    from lmlab.sweeps.jobs import GridPoints
    from lmlab.sweeps.sweeper import expand

    points = GridPoints(expand(arguments, config_loader))
    if swept := [key for key in points.keys if key.split(".")[0] == LAB]:
        raise UserError(f"{swept[0]} is one for the whole page", where=swept[0], fix="write one value, [a,b]")
    composed = [config_loader.load_sweep_config(master, job) for job in points.jobs]
    lab = lab_of(composed[0])
    name = composed[0].run_name or _name(points.keys)
    folder = free_folder(composed[0].output_root, str(name), overwrite=bool(composed[0].overwrite))
    entries = [_checked(job, each, points.keys) for job, each in zip(points.jobs, composed, strict=True)]
    fit = [entry.config for entry in entries if entry.config is not None]
    if not fit and entries[0].error is not None:
        raise entries[0].error
    beside = [_loaded(path, fit[0], points.jobs[0]) for path in lab.against]

    def run_config(overrides: Sequence[str]) -> RunConfig:
        return to_run_config(without_lab(config_loader.load_sweep_config(master, list(overrides))))

    groups, notes = held_out_groups(lab, fit, run_config)
    shutil.rmtree(folder, ignore_errors=True)
    for number, entry in enumerate(entries, start=1):
        _train(entry, folder / f"{number}-{slug(entry.label.replace('=', '-'), max_length=60)}")
        print(f"[{number}/{len(entries)}] {entry.label}: {_became(entry)}", flush=True)
    if all(entry.tokenizer is None for entry in entries) and entries[0].error is not None:
        raise entries[0].error
    all_entries = _with_unique_labels([*entries, *beside])
    results = _results(all_entries, groups, lab, fit[0], notes)
    results["name"] = folder.name
    return _write(results, folder)


def _name(keys: Sequence[str]) -> str:
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    words = "-".join(key.rsplit(".", 1)[-1] for key in keys) or "lab"
    return f"{moment}-{slug(words, max_length=40)}-{secrets.token_hex(2)}"


def _checked(job: list[str], composed: Any, keys: Sequence[str]) -> Entry:
    """The entry of a combination, its config validated."""
    parts = {}
    for text in job:
        key, _, value = text.lstrip("+~").partition("=")
        if key in keys:
            parts[key] = value if key in SAID_ALONE else f"{key.rsplit('.', 1)[-1]}={value}"
    label = " ".join(parts.values()) or "tokenizer"
    family = " ".join(part for key, part in parts.items() if key != "tokenizer.vocab_size") or "trained"
    try:
        config = to_run_config(without_lab(composed))
    except UserError as error:
        return Entry(label, job, family, status=f"refused: {error}", error=error)
    return Entry(label, job, family, config=config)


def _loaded(path: str, config: RunConfig, overrides: list[str]) -> Entry:
    """A tokenizer to put beside the trained ones."""
    from lmlab.models.build import EMBEDDED, resolve_source
    from lmlab.tokenizers import load_tokenizer

    place = Path(resolve_source(path) if path == EMBEDDED else path)
    name = place.resolve().parent.name if place.is_file() else place.name
    if (place / "tokenizer" / "tokenizer.json").is_file():  # of a run
        place = place / "tokenizer"
    local = place.exists()
    tokenizer = load_tokenizer(place if local else path)
    pieces(tokenizer, "a")  # refuses a slow one now, and not after all the training
    entry = Entry(name or path, [], given=str(place) if local else path, config=config)
    entry.tokenizer, entry.status = tokenizer, "loaded"
    entry.command = train_command(overrides, str(entry.given))
    return entry


def _train(entry: Entry, folder: Path) -> None:
    if entry.config is None:
        return
    began = time.perf_counter()
    try:
        entry.tokenizer = make_tokenizer(entry.config, folder)
    except UserError as error:
        entry.status, entry.error = f"refused: {error}", error
        return
    entry.status, entry.folder, entry.seconds = "trained", folder, time.perf_counter() - began
    entry.command = train_command(entry.overrides, os.path.relpath(folder))


def _became(entry: Entry) -> str:
    if entry.tokenizer is None:
        return entry.status
    return f"{len(entry.tokenizer):,} tokens, {entry.seconds:.1f} s"


def _with_unique_labels(entries: list[Entry]) -> list[Entry]:
    seen: dict[str, int] = {}
    for entry in entries:
        seen[entry.label] = seen.get(entry.label, 0) + 1
        if seen[entry.label] > 1:
            entry.label = f"{entry.label} ({seen[entry.label]})"
    return entries


# --- figures ----------------------------------------------------------------------------------------------------------


def _results(
    entries: list[Entry], groups: dict[str, list[str]], lab: LabConfig, first: RunConfig, notes: list[str]
) -> dict[str, Any]:
    """All of the page as plain values; the first entry that has a hash owns it, later ones say that they are the same."""
    from lmlab.tokenizers import tokenizer_hash

    known: dict[str, str] = {}
    bodies: dict[str, int | None] = {}
    rows = []
    for entry in entries:
        row = {
            "label": entry.label,
            "status": entry.status,
            "command": entry.command,
            "seconds": entry.seconds,
        }
        row["path"] = entry.given or (os.path.relpath(entry.folder) if entry.folder else None)
        row["overrides"] = entry.overrides
        if entry.tokenizer is not None and entry.config is not None:
            own = known.setdefault(tokenizer_hash(entry.tokenizer, with_chat=False), entry.label)
            row["family"] = entry.family or f"{entry.label} (loaded)"
            row["same_as"] = None if own == entry.label else own
            measured = {name: measure(entry.tokenizer, texts) for name, texts in groups.items()}
            total = sum(measured.values(), Measurement())
            row |= _figures(entry, measured, total)
            row["embedding"] = _embedding(entry, lab, bodies)
            row["excerpts"] = {
                name: pieces(entry.tokenizer, excerpt(texts, lab.excerpt_chars))
                for name, texts in groups.items()
            }
        rows.append(row)
    sizes = {
        name: {"texts": len(texts), "characters": sum(map(len, texts))} for name, texts in groups.items()
    }
    return {"model": first.model.label, "groups": sizes, "notes": notes, "tokenizers": rows}


def _figures(entry: Entry, measured: dict[str, Measurement], total: Measurement) -> dict[str, Any]:
    return {
        "vocab_size": len(entry.tokenizer),
        "used": len(total.ids),
        "total": _row(total),
        "groups": {name: _row(each) for name, each in measured.items()},
    }


def _row(found: Measurement) -> dict[str, Any]:
    names = ("texts", "size_bytes", "characters", "words", "tokens", "split_words", "exact")
    loss = None if found.loss is None else {"before": found.loss.before, "after": found.loss.after}
    return {
        **{name: getattr(found, name) for name in names},
        "bytes_per_token": found.bytes_per_token,
        "tokens_per_word": found.fertility,
        "split_share": found.split_share,
        "loss": loss,
    }


def _embedding(entry: Entry, lab: LabConfig, bodies: dict[str, int | None]) -> dict[str, Any] | None:
    """What the embedding costs in the entry's model; None for a model without a hidden size."""
    from lmlab.models.build import hidden_size
    from lmlab.tokenizers import rows_needed

    assert entry.config is not None
    rows, model = rows_needed(entry.tokenizer), entry.config.model
    hf_config = model.hf_config(rows)
    size = lab.hidden_size or hidden_size(hf_config)
    if size is None:
        return None
    key = model.model_dump_json()
    if lab.hidden_size is None and key not in bodies:
        bodies[key] = _body(hf_config)
    cost = EmbeddingCost(rows, size, bodies.get(key))
    costs = {
        name: {
            "parameters": cost.parameters(tied=tied),
            "share": cost.share(tied=tied),
            "bf16_mb": cost.megabytes(tied=tied, bytes_per_parameter=2),
            "training_mb": cost.megabytes(tied=tied, bytes_per_parameter=16),
        }
        for name, tied in (("tied", True), ("untied", False))
    }
    is_tied = bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))
    return {"rows": rows, "hidden_size": size, "model": model.label, "model_is_tied": is_tied, **costs}


def _body(hf_config: Any) -> int | None:
    """Parameters of the model but for embedding and head; None where its code comes with its weights."""
    from lmlab.models.adapters import model_without_weights

    model = model_without_weights(hf_config)
    if model is None:
        return None
    ends = {
        id(part.weight)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
    }
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in ends)


def excerpt(texts: Sequence[str], size: int) -> str:
    """The beginning of the first text that has any, at most ``size`` characters, cut after a word where there is one."""
    text = next((text for text in texts if text.strip()), "")
    if len(text) <= size:
        return text
    words = max(text.rfind(" ", 0, size + 1), text.rfind("\n", 0, size + 1))
    return text[: words if words > size // 2 else size]


def _write(results: dict[str, Any], folder: Path) -> int:
    from lmlab.tracking.tokenizer_page import print_tokenizers, write_tokenizers

    page = write_tokenizers(results, folder)
    print_tokenizers(results)
    print(
        f"page:  {os.path.relpath(page)}   figures: {os.path.relpath(folder / 'results.csv')}, results.json"
    )
    return 0
