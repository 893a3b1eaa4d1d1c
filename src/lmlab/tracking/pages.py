"""What the HTML pages share: templates, the one script that may run in them, and writing a page in one piece.

Pages carry everything inline and ask for nothing: the policy in each forbids any address, and any script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from markupsafe import Markup

from lmlab.records import UserError
from lmlab.tracking import plots
from lmlab.tracking.values import shown, visible

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shell:
    """The script of a page, and the content security policy that lets it and nothing else run.

    Attributes:
        mark: by which a page of ours is known again.
        live: a server makes the page, and the script may ask it (and no other) again.
    """

    live: bool = False
    mark: ClassVar[Markup] = Markup('<meta name="generator" content="lmlab">')

    @property
    def script(self) -> Markup:
        """page.js as it stands in the page."""
        return Markup(_script())

    @property
    def policy(self) -> str:
        """For the page's ``Content-Security-Policy``."""
        digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
        asks = "; connect-src 'self'" if self.live else ""
        return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{asks}"


@cache
def _script() -> str:
    return (_HERE / "page.js").read_text(encoding="utf-8").strip()


@cache
def templates() -> jinja2.Environment:
    """Where the pages' templates are; everything put into them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE, encoding="utf-8"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(visible=visible, shown=shown)
    return environment


def write_page(target: Path, page: str) -> Path:
    """Write a page in one piece, so that nobody opens half of one.

    Raises:
        UserError: the directory cannot be written to.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # Half a surrogate pair, which JSON can carry and UTF-8 cannot, comes out as \udXXX.
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page)
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(
            f"cannot write the report, {error.strerror}", where=str(target), fix="make its directory writable"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def draw_all(
    panels: Iterable[Any], draw: Callable[[Any], str] | None = None
) -> tuple[list[tuple[Any, Markup]], list[str]]:
    """The plots as markup, and a sentence for each that could not be drawn."""
    drawn, failures = [], []
    for panel in panels:
        try:
            drawn.append((panel, Markup((draw or plots.draw)(panel))))
        # Values such as 1e308 overflow inside matplotlib; the page must come out anyway.
        except Exception as error:
            failures.append(f"The plot '{panel.title}' could not be drawn: {type(error).__name__}: {error}.")
    return drawn, failures
