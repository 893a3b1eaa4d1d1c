"""Every error line and warning of the sources, read from their syntax trees: the tables of docs/troubleshooting.md.

`python -m tests.docs.error_lines` writes them anew between the marks in that page; what stands above the first mark is
written by hand. A text that is put together when it is raised shows ``…`` for what is only known then; one that comes in
several forms has a row for each.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- errors: begin -->", "<!-- errors: end -->"
ERRORS = ("UserError", "RefusedError", "RunFailedError")
GAP = "…"
FORMS = 24
"""Forms of one text beyond which its parts are left open."""
CURES = 3
"""Different cures of one text beyond which the line itself must say which."""
TELLING = 12
"""Characters from which a form of a part is spelled out beside an open one."""
DEPTH = 4
"""How many names deep a text is looked for."""

SECTIONS = (  # title, what begins with: paths below src/lmlab, and scripts
    ("Command line and config", ("config/", "start.py", "records.py", "registry.py", "runs.py")),
    ("Data", ("data/", "remote.py", "scripts/tokenize_corpus")),
    ("Tokenizer", ("tokenizers/", "tokenizer_lab/", "scripts/train_tokenizer")),
    ("Model, hub and adapters", ("models/", "load.py", "assemble.py")),
    ("Memory", ("planning.py", "fitting.py", "presets.py", "scripts/plan")),
    ("Training", ("training/", "session.py", "worker.py", "announce.py", "lines.py")),
    ("The run's directory and resume", ("journal.py", "resume.py")),
    ("Several processes and nodes", ("ranks.py",)),
    ("W&B, reports and comparisons", ("tracking/", "scripts/report", "scripts/workspace")),
    ("Sweeps and searches", ("sweeps/",)),
    ("Generate and chat", ("generation/", "chat/", "scripts/generate", "scripts/chat")),
    ("Evaluate", ("evaluation/", "evaluate.py", "measured.py", "variants.py", "scripts/evaluate")),
    ("Export", ("export/", "exporting.py", "certify.py", "scripts/export")),
    ("Checks and reproduction", ("checks/", "reproduce.py", "scripts/check", "scripts/reproduce")),
)
OTHERS = "Anything else"


@dataclass(frozen=True)
class Line:
    """One form of an error or a warning.

    Attributes:
        file: where it is raised, from ``src/lmlab`` or as ``scripts/NAME.py``.
        what: the text, `GAP` for its open parts.
        fix: what to do, "" where it says none or only when it is raised.
        kind: the exception's name, or "warning".
    """

    file: str
    number: int
    what: str
    fix: str
    kind: str

    @property
    def fixed(self) -> str:
        """The longest part of the text that is the same every time."""
        return max((part.strip() for part in self.what.split(GAP)), key=len)

    @property
    def is_open(self) -> bool:
        """Whether nothing of the text is fixed: an error of another place that is passed on."""
        return len(re.sub(r"\W", "", self.fixed)) < 4


def sources() -> list[Path]:
    """All modules that may speak to a user."""
    return sorted([*(ROOT / "src" / "lmlab").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def name_of(file: Path) -> str:
    """``data/formats.py``, ``scripts/plan.py``."""
    base = ROOT if file.parent.name == "scripts" else ROOT / "src" / "lmlab"
    return file.relative_to(base).as_posix()


@cache
def lines() -> list[Line]:
    """Errors and warnings of all sources, each form once a file."""
    found: dict[tuple[str, str, str], Line] = {}
    for file in sources():
        module = Module(file)
        for line in itertools.chain(module.errors(), module.warnings()):
            found.setdefault((line.file, line.what, line.fix), line)
    return list(found.values())


class Module:
    """One source file."""

    def __init__(self, file: Path) -> None:
        self.name = name_of(file)
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.nodes = list(ast.walk(self.tree))
        self.calls: dict[str, list[ast.Call]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Call):
                self.calls.setdefault(_called(node), []).append(node)
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}

    def errors(self) -> Iterator[Line]:
        """Every call of an error's class."""
        for node in (call for name in ERRORS for call in self.calls.get(name, [])):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            what = node.args[0] if node.args else given.get("what")
            for said, cure in self._pairs(what, given.get("fix")):
                fixes = [""] if cure is None else _closed(self.texts(cure))
                fix = " / ".join(fixes) if len(fixes) <= CURES else GAP
                for text in [GAP] if said is None else _closed(self.texts(said)):
                    yield Line(self.name, node.lineno, _flat(text), _flat(fix), _called(node))

    def _pairs(
        self, what: ast.expr | None, fix: ast.expr | None
    ) -> list[tuple[ast.expr | None, ast.expr | None]]:
        """What goes together where both are names: assigned as a pair, or given in one call."""
        function = self._function(what) if isinstance(what, ast.Name) else None
        if function is None or not isinstance(what, ast.Name) or not isinstance(fix, ast.Name):
            return [(what, fix)]
        found: list[tuple[ast.expr | None, ast.expr | None]] = []
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                target = node.targets[0]
                names = [getattr(each, "id", "") for each in getattr(target, "elts", [])]
                if what.id in names and fix.id in names:
                    values = node.value.elts
                    found.append((values[names.index(what.id)], values[names.index(fix.id)]))
        for call in self.calls.get(function.name, []):
            bound = _bound(function, call)
            if what.id in bound and fix.id in bound:
                found.append((bound[what.id], bound[fix.id]))
        return found or [(what, fix)]

    def warnings(self) -> Iterator[Line]:
        """Texts that begin with ``warning: ``, and those of functions that gather notes."""
        for node in self.nodes:
            if isinstance(node, ast.Constant | ast.JoinedStr) and not isinstance(
                self.parents.get(node), ast.JoinedStr
            ):
                for text in self.texts(node):
                    if re.match(r"(error|warning|W&B): \w", text) and len(text) > 20:
                        yield Line(self.name, node.lineno, _flat(text), "", "warning")
            if isinstance(node, ast.Call) and _called(node) == "warning" and node.args:  # of a logger
                for text in self.texts(node.args[0]):
                    yield Line(self.name, node.lineno, _flat(re.sub(r"%[sd]", GAP, text)), "", "warning")
            if isinstance(node, ast.FunctionDef) and node.name in ("notes", "warnings"):
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and _called(call) == "append" and call.args:
                        for text in self.texts(call.args[0]):
                            mark = "note" if node.name == "notes" else "warning"
                            yield Line(self.name, call.lineno, _flat(f"{mark}: {text}"), "", "warning")

    def texts(self, node: ast.expr, depth: int = DEPTH) -> list[str]:
        """The forms that an expression's text can have."""
        if isinstance(node, ast.Constant):
            return [node.value if isinstance(node.value, str) else "" if node.value is None else GAP]
        if isinstance(node, ast.Call) and _called(node) == "suggest":
            return ["did you mean …? one of …"]
        if isinstance(node, ast.IfExp):
            return _few([*self.texts(node.body, depth), *self.texts(node.orelse, depth)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([self.texts(node.left, depth), self.texts(node.right, depth)])
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            return _few([text for value in node.values for text in self.texts(value, depth)])
        if isinstance(node, ast.JoinedStr):
            return _joined([self._part(value, depth) for value in node.values])
        if isinstance(node, ast.Name) and depth > 0:
            return self._of_name(node, depth - 1) or [GAP]
        return [GAP]

    def _part(self, node: ast.expr, depth: int) -> list[str]:
        """A part of an f-string; only what is decided there or nearby is spelled out."""
        if not isinstance(node, ast.FormattedValue):
            return self.texts(node, depth)
        if node.format_spec is not None or node.conversion != -1:
            return [GAP]
        forms = self.texts(node.value, min(depth, 1))
        telling = [form for form in forms if len(form) > TELLING]
        return forms if GAP not in forms else [*telling, GAP] if telling else [GAP]

    def _of_name(self, node: ast.Name, depth: int) -> list[str]:
        """What is assigned to a name in its function, given for it by that function's callers, or fixed in the module."""
        function = self._function(node)
        if function is None:
            return []
        found = [text for value in _assigned(function, node.id) for text in self.texts(value, depth)]
        arguments = [*function.args.posonlyargs, *function.args.args]
        names = [argument.arg for argument in arguments]
        if not found and node.id in [*names, *(each.arg for each in function.args.kwonlyargs)]:
            found = [text for value in self._given(function, node.id) for text in self.texts(value, depth)]
        if not found:
            found = [text for value in _assigned(self.tree, node.id) for text in self.texts(value, depth)]
        return _few(found)

    def _given(self, function: ast.FunctionDef, name: str) -> Iterator[ast.expr]:
        """The expressions that callers in this module give for a parameter."""
        for call in self.calls.get(function.name, []):
            bound = _bound(function, call)
            if name in bound:
                yield bound[name]

    def _function(self, node: ast.AST) -> ast.FunctionDef | None:
        while (parent := self.parents.get(node)) is not None:
            if isinstance(parent, ast.FunctionDef):
                return parent
            node = parent
        return None


def _assigned(scope: ast.AST, name: str) -> Iterator[ast.expr]:
    body = scope.body if isinstance(scope, ast.Module) else list(ast.walk(scope))
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    yield from (v for t, v in pairs if isinstance(t, ast.Name) and t.id == name)
        elif (
            isinstance(node, ast.AnnAssign | ast.NamedExpr)
            and isinstance(node.target, ast.Name)
            and node.target.id == name
            and node.value is not None
        ):
            yield node.value


def _bound(function: ast.FunctionDef, call: ast.Call) -> dict[str, ast.expr]:
    """Parameter -> what a call gives for it."""
    arguments = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    own = [each for each in arguments if each not in ("self", "cls")]
    named = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    return {**dict(zip(own, call.args, strict=False)), **named}


def _called(call: ast.Call) -> str:
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _joined(parts: list[list[str]]) -> list[str]:
    """Every combination of the parts' forms; open where there would be too many."""
    number = 1
    for part in parts:
        number *= len(part)
    if number > FORMS:
        parts = [part if len(part) == 1 else [GAP] for part in parts]
    return ["".join(each) for each in itertools.product(*parts)]


def _few(texts: list[str]) -> list[str]:
    """Each form once."""
    return list(dict.fromkeys(texts))


def _closed(texts: list[str]) -> list[str]:
    """The forms that say something, or the open one where there is no other."""
    return [text for text in texts if text != GAP] or [GAP]


def _flat(text: str) -> str:
    """On one line, as `UserError` shows it, with neighbouring gaps as one."""
    return " ".join(re.sub(rf"(?:{GAP}[ ,]*)+{GAP}", GAP, text).split())


def section_of(file: str) -> str:
    """The heading that a file's errors stand under."""
    return next((title for title, starts in SECTIONS if file.startswith(starts)), OTHERS)


@cache
def tables() -> str:
    """The generated part of the page."""
    found = [line for line in lines() if not line.is_open]
    parts = []
    for title in [*(title for title, _ in SECTIONS), OTHERS]:
        here = sorted((line for line in found if section_of(line.file) == title), key=_order)
        if not here:
            continue
        parts += [f"### {title}", "", "| it says | what to do | from |", "| --- | --- | --- |"]
        for line in here:
            cure = line.fix if line.fix and line.fix != GAP else "as the line says" if line.fix else "–"
            parts.append(f"| {_code(line.what)} | {_text(cure)} | {line.file} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _order(line: Line) -> tuple[bool, str, int]:
    return line.kind == "warning", line.file, line.number


def _code(text: str) -> str:
    marked = f"`` {text} ``" if "`" in text else f"`{text}`"
    return marked.replace("|", "\\|")


def _text(text: str) -> str:
    for character in "\\|<>*_`":
        text = text.replace(character, f"\\{character}")
    return text


def page() -> str:
    """The page with its generated part made anew."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
