"""What stands in the pages: commands, files in fenced blocks, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PROGRAMS = (
    *("python", "python3", "make", "pip", "pytest", "torchrun", "srun", "sbatch", "wandb", "ray", "jupyter"),
    *("optuna-dashboard", "tensorboard", "ollama", "vllm", "docker", "git", "export", "cd", "."),
)
"""First words by which a line of a code block is known as a command, whatever stands around it."""
SHELL = ("sh", "bash", "shell")
"""Languages of fenced blocks in which every line is a command."""
FENCE = re.compile(r"^ {0,3}```\s*([\w+-]*)\s*$")
ASSIGNMENTS = re.compile(r"^(?:[A-Z_][A-Z0-9_]*=\S*\s+)*")


@dataclass(frozen=True)
class Command:
    """A command as it stands in a page.

    Attributes:
        page: path from the root of the repository.
        line: number of its first line.
        text: one line, continuation lines joined; without a leading ``$``.
        error: the line ``error: ...`` that the page shows below it; "" where the command is to work.
    """

    page: str
    line: int
    text: str
    error: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def code_lines(text: str) -> Iterator[tuple[int, str, str]]:
    """(number, language, line) of every line of an indented (language ``""``) or fenced block, its indent taken off."""
    language: str | None = None
    before_is_blank, indented = True, False
    for number, line in enumerate(text.splitlines(), start=1):
        if fence := FENCE.match(line):
            language = (fence[1] or "text") if language is None else None
            before_is_blank = indented = False
            continue
        if language is not None:
            yield number, language, line
            continue
        indented = line.startswith("    ") and (indented or before_is_blank)
        before_is_blank = not line.strip()
        if indented:
            yield number, "", line[4:]


def commands_in(text: str, page: str) -> list[Command]:
    """The commands of a page: lines of its code blocks that begin with ``$``, a known program, or stand in a shell block."""
    found: list[Command] = []
    open_command: tuple[int, str] | None = None
    of_code = {number: line.strip() for number, _, line in code_lines(text)}
    for last, language, line in code_lines(text):
        number, line = last, line.strip()
        if open_command is not None:
            number, line = open_command[0], f"{open_command[1]} {line}"
        elif line.startswith("$ "):
            line = line[2:]
        elif language in ("python", "yaml", "json", "text"):
            continue
        else:
            words = line.removeprefix(".venv/bin/")[ASSIGNMENTS.match(line).end() :].split()  # type: ignore[union-attr]
            piped = re.search(r"\| *python\b", line)
            if not words or line.startswith("#"):
                continue
            if not (words[0] in PROGRAMS or piped or language in SHELL):
                continue
        if line.endswith("\\"):
            open_command = (number, line[:-1].rstrip())
            continue
        open_command = None
        below = of_code.get(last + 1, "")
        found.append(Command(page, number, line, below if below.startswith("error: ") else ""))
    return found


INLINE = re.compile(r"(?<!`)`(?:\$ )?((?:python|torchrun|srun|make) [^`]+)`(?!`)")


def inline_commands_in(text: str, page: str) -> list[Command]:
    """Commands between back quotes in running text; one may go over a line's end."""
    prose: list[str] = text.splitlines()
    for number, _, _ in code_lines(text):
        prose[number - 1] = ""
    joined = "\n".join(prose)
    return [
        Command(page, joined.count("\n", 0, match.start()) + 1, " ".join(match[1].split()))
        for match in INLINE.finditer(joined)
    ]


def all_commands() -> list[Command]:
    """Of all pages, in their order."""
    return [command for page in PAGES for command in commands_in(*_read(page))]


def all_inline_commands() -> list[Command]:
    """Of all pages, in their order."""
    return [command for page in PAGES for command in inline_commands_in(*_read(page))]


def _read(page: Path) -> tuple[str, str]:
    return page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()


def files_in(text: str) -> dict[str, str]:
    """File name -> content of the fenced blocks that follow a line with nothing but a name between back quotes."""
    lines, found, name = text.splitlines(), dict[str, str](), None
    block: list[str] | None = None
    for line in lines:
        if FENCE.match(line):
            if block is None:
                block = []
            else:
                if name is not None:
                    assert name not in found, f"{name} stands twice"
                    found[name] = "\n".join(block) + "\n"
                block = name = None
        elif block is not None:
            block.append(line)
        elif named := re.fullmatch(r"`([\w./-]+\.\w+)`", line):
            name = named[1]
        elif line.strip():
            name = None
    return found


LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")


def links_in(text: str) -> list[str]:
    """Targets of links and images outside of code."""
    prose = text.splitlines()
    for number, _, _ in code_lines(text):
        prose[number - 1] = ""
    return LINK.findall(re.sub(r"`[^`\n]*`", "``", "\n".join(prose)))


def anchors_in(text: str) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    prose = text.splitlines()
    for number, _, _ in code_lines(text):
        prose[number - 1] = ""
    found: dict[str, int] = {}
    anchors = set()
    for line in prose:
        if heading := re.match(r"#{1,6} +(.+?) *#*$", line):
            plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower())
            slug = plain.replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            anchors.add(f"{slug}-{count}" if count else slug)
    return anchors
