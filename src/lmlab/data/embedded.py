"""The two corpora that come with every Python: its documentation, and generated triples over its words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lmlab.data.config import DataConfig, cache_root, counted
from lmlab.data.intake import Intake
from lmlab.records import Record
from lmlab.registry import data_sources


@data_sources.register
class PythonHelp(DataConfig):
    """Documentation of the running Python: text for pretraining, triples for fine-tuning."""

    kind: Literal["python_help"]

    def format_for(self, task: str) -> str:
        """Plain text when pretraining, triples when fine-tuning."""
        if self.format != "auto":
            return self.format
        return "text" if task == "pretrain" else "triples"

    def content_key(self) -> str:
        return embedded_corpus()["key"]

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        corpus = embedded_corpus()["text" if self.format_for(task) == "text" else "triples"]
        yield from counted(intake, (Record(**record) for record in corpus))


@data_sources.register
class Skills(DataConfig):
    """Generated triples with one right answer each.

    Attributes:
        level: 1 (learnt in minutes on a CPU) to 3.
        num_records: how many are generated, before the validation split.
        data_seed: seed of the generator; apart from the run's seed, so that all runs see the same records.
    """

    kind: Literal["skills"]
    level: int = Field(ge=1, le=3)
    num_records: int = Field(ge=10)
    data_seed: int

    def content_key(self) -> str:
        from lmlab.data import skills

        generator = hashlib.sha256(Path(skills.__file__).read_bytes()).hexdigest()[:8]
        return f"{embedded_corpus()['key']}-{generator}-{self.level}-{self.num_records}-{self.data_seed}"

    def records(self, intake: Intake, *, task: str) -> Iterator[Record]:
        from lmlab.data import skills

        words = embedded_corpus()["words"]
        triples = skills.triples(
            level=self.level, num_records=self.num_records, seed=self.data_seed, words=words
        )
        yield from counted(intake, triples)


_EMBEDDED: dict[str, Any] = {}


def embedded_corpus() -> dict[str, Any]:
    """The documentation of the running Python as ``{key, text, triples, words}``, read once per Python version.

    Reading all docstrings takes seconds, so the result lies in the cache, named by version and library folder.
    """
    import sys
    import sysconfig

    from lmlab.data import python_help

    if _EMBEDDED:
        return _EMBEDDED
    identity = f"{sys.version}|{sysconfig.get_paths()['stdlib']}|{python_help.FORMAT_VERSION}"
    file = cache_root() / "python_help" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        _EMBEDDED.update(json.loads(file.read_text(encoding="utf-8")))
        return _EMBEDDED
    except (OSError, ValueError):
        pass  # not there yet, or cut by a kill: read the documentation again

    def plain(records: list[Record]) -> list[dict[str, Any]]:
        return [{"fields": r.fields, "where": r.where, "group": r.group} for r in records]

    corpus = {
        "key": python_help.version_key(),
        "text": plain(python_help.texts()),
        "triples": plain(python_help.triples()),
        "words": python_help.words(),
    }
    _EMBEDDED.update(corpus)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(corpus), encoding="utf-8")
    temporary.replace(file)
    return _EMBEDDED
