"""An adapter's directory and the base that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmlab.journal import read_json
from lmlab.records import UserError


@dataclass(frozen=True)
class AdapterDirectory:
    """An adapter's directory and its lmlab.json ({} for one of PEFT's users)."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> AdapterDirectory:
        """Read and checked.

        Raises:
            UserError: see `lmlab.models.adapter_files.check_adapter`.
        """
        from lmlab.models.adapter_files import check_adapter

        check_adapter(path)
        return cls(path, read_json(path / "lmlab.json"))

    def base(self) -> tuple[str, str | None]:
        """(name or path, revision) of the base.

        Raises:
            UserError: it names none.
        """
        source, revision = self.named_base()
        if not source:
            raise UserError(
                "the adapter does not name its base",
                where=str(self.path),
                fix="set base_model_name_or_path in it",
            )
        return source, revision

    def named_base(self) -> tuple[str | None, str | None]:
        """(name or path, revision) as lmlab recorded them, else as PEFT did; None where neither did."""
        if base := self.info.get("base"):
            return base, self.info.get("base_revision")
        config = read_json(self.path / "adapter_config.json")
        revision = config.get("revision")
        return config.get("base_model_name_or_path"), str(revision) if revision else None


def refuse_other_names(named: Mapping[str, AdapterDirectory], source: str) -> None:
    """Look at the names where no fingerprint tells the base.

    Raises:
        UserError: a further adapter names neither ``source``, the base in use, nor the first one's base.
    """
    first, *further = named.values()
    own, own_revision = first.named_base()
    allowed = {_place(source), _place(own)}
    for each in further:
        base, revision = each.named_base()
        if each.info.get("base_fingerprint") or not base:
            continue
        differ = own_revision and revision and own_revision != revision
        if _place(base) not in allowed or differ:
            raise UserError(
                f"the adapter names another base: {base}" + (f" at {revision}" if revision else ""),
                where=f"{each.path}, base {source}",
                fix="load it alone, or if it is the same model, name that in its adapter_config.json",
            )


def _place(base: str | None) -> str:
    """A hub id as it is; a directory, however it is written, as one path."""
    from lmlab.models.build import resolve_source

    try:
        return (
            str(Path(resolve_source(str(base))).resolve()) if base and Path(str(base)).exists() else str(base)
        )
    except (UserError, OSError, ValueError):
        return str(base)
