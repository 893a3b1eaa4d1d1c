"""The documentation of the Python that runs, as text and as instruction triples: real data without a network.

Two sources, both only parsed and never imported (an import of `turtle` or `antigravity` does things): the topics
of `pydoc_data`, read as a literal, and the docstrings of the standard library, read with `ast`. A docstring that
several modules carry is kept once, and topics that quote each other share a group, so that a split by group never
validates on a passage that was trained. On 3.11: 465,000 + 1.76 million characters, 8,500 triples.
Trade-off: parsing 724 files takes 2-4 s, once per process, where a stored copy would be instant but describe
some other Python; `version_key` hashes the sources without parsing, so a cache keyed by it seldom pays that.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from lmlab.records import Record, UserError

FORMAT_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Changes with this file, so that no cache outlives a change of what is made from the documentation."""
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pgen2", "__pycache__", "lib-dynload"}
)
COPY_LENGTH = 40
"""A passage of fewer characters may repeat ("See base class."); a longer one counts as the same passage."""
QUOTAS = {
    "describe": 3400, "signature": 1300, "parameters": 900, "class_of": 700,
    "name": 700, "import": 600, "module_of": 500, "module": 500,
}  # fmt: skip
"""At most so many triples of each kind, so that none is above 45 % (`describe` alone has 5,000 candidates)."""
NOT_PROSE = re.compile(r"^\s*(>>>|[-*+|:@]|\w+\s*=|\d+[.)]\s)|={3}|-{3}|\*{3}", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!cf\.)(?<!vs\.)\s+(?=[A-Z`'\"(])")
WORD = re.compile(r"(?<![\w'.@/\\-])[a-z]+(?![\w'(=/\\-]|\.\w)")


@dataclass(frozen=True)
class Entry:
    """One documented thing: `qualname` is empty for a module, `signature` is a function's parameters or a
    class's bases as written, `kind` is module, class, function or method."""

    module: str
    qualname: str
    kind: str
    signature: str
    doc: str

    @property
    def name(self) -> str:
        """The last part of the qualified name."""
        return self.qualname.rpartition(".")[2]

    @property
    def public(self) -> bool:
        """Whether no part of the path begins with an underscore."""
        return not any(part.startswith("_") for part in f"{self.module}.{self.qualname}".split("."))


@lru_cache(maxsize=1)
def _sources() -> tuple[tuple[str, bytes], ...]:
    """(dotted module name, source) of every standard library module, sorted by path.

    Raises:
        UserError: this Python ships its library without sources.
    """
    found = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts) and not path.name.startswith("_sysconfigdata"):
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            found.append((module, path.read_bytes()))
    if not any(module.startswith("pydoc_data") for module, _ in found):
        raise UserError(
            f"this Python has no library sources or no pydoc topics in {root}",
            where="data=python_help",
            fix="install its full standard library, or use data=skills or data=text",
        )
    return tuple(found)


def version_key() -> str:
    """``3.11.7-<16 hex digits>``: the Python's version and a hash over the sources read and FORMAT_VERSION."""
    digest = hashlib.sha256(FORMAT_VERSION.encode())
    for module, source in _sources():
        digest.update(f"\0{module}\0{len(source)}\0".encode())
        digest.update(source)
    return f"{platform.python_version()}-{digest.hexdigest()[:16]}"


@lru_cache(maxsize=1)
def topics() -> Mapping[str, str]:
    """pydoc's help topics, name -> text, sorted by name."""
    found: dict[str, str] = {}
    for module, source in _sources():
        if not module.startswith("pydoc_data"):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                found.update(ast.literal_eval(node.value))
    return MappingProxyType({name: found[name] for name in sorted(found)})


def _topic_groups() -> dict[str, str]:
    """Topic -> group; topics with a passage in common ("compound" quotes "if") have the first one's name."""
    leader = {name: name for name in topics()}
    owner: dict[str, str] = {}
    for name, text in topics().items():
        for passage in (part.strip() for part in text.split("\n\n")):
            if len(passage) >= COPY_LENGTH:
                one, other = leader[owner.setdefault(passage, name)], leader[name]
                if one != other:
                    first, last = sorted((one, other))
                    leader = {key: first if value == last else value for key, value in leader.items()}
    return {name: f"topic:{first}" for name, first in leader.items()}


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes of a body, also under `if`, `try`, `with` (platform branches)."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _definitions(handler.body)


def _walk(module: str, body: list[ast.stmt], prefix: str = "") -> Iterator[Entry]:
    for node in _definitions(body):
        doc, qualname = ast.get_docstring(node, clean=False) or "", prefix + node.name
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(part) for part in (*node.bases, *node.keywords))
            yield Entry(module, qualname, "class", bases, inspect.cleandoc(doc))
            yield from _walk(module, node.body, f"{qualname}.")
        else:
            kind = "method" if prefix else "function"
            yield Entry(module, qualname, kind, ast.unparse(node.args) if doc else "", inspect.cleandoc(doc))


@lru_cache(maxsize=1)
def _read() -> tuple[tuple[Entry, ...], MappingProxyType[str, frozenset[str]]]:
    """Every documented thing, each docstring in one module only, and which modules define a top-level name."""
    everything: list[Entry] = []
    for module, source in _sources():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates and fixtures that are not Python; none on 3.11
            continue
        doc = inspect.cleandoc(ast.get_docstring(tree, clean=False) or "")
        everything += [Entry(module, "", "module", "", doc), *_walk(module, tree.body)]
    definers: defaultdict[str, set[str]] = defaultdict(set)
    owner: dict[str, str] = {}
    for entry in sorted(
        everything, key=lambda entry: not entry.public
    ):  # stable: the public module keeps a copy
        if "." not in entry.qualname:
            definers[entry.qualname].add(entry.module)
        owner.setdefault(entry.doc, entry.module)
    kept: dict[tuple[str, str], Entry] = {}
    for entry in everything:
        if entry.doc and (len(entry.doc) < COPY_LENGTH or owner[entry.doc] == entry.module):
            kept.setdefault((entry.module, entry.qualname), entry)  # platform branches: the first
    return tuple(kept.values()), MappingProxyType(
        {name: frozenset(where) for name, where in definers.items()}
    )


def entries() -> tuple[Entry, ...]:
    """The documented things of the standard library, by module path and then in source order."""
    return _read()[0]


def texts() -> list[Record]:
    """One record per module (its documentation in source order) and one per topic; field ``text``."""
    parts: dict[str, list[str]] = {}
    for entry in entries():
        lines = parts.setdefault(entry.module, [f"Module {entry.module}"])
        if entry.kind == "module":
            lines.append(entry.doc)
        else:
            bases = f"({entry.signature})" if entry.signature or entry.kind != "class" else ""
            head = f"{'class' if entry.kind == 'class' else 'def'} {entry.qualname}{bases}"
            lines.append(f"{head}\n{textwrap.indent(entry.doc, '    ')}")
    modules = [Record({"text": "\n\n".join(parts[name])}, f"python_help:{name}", name) for name in parts]
    groups = _topic_groups()
    return modules + [
        Record({"text": text.strip()}, f"python_help:topic:{name}", groups[name])
        for name, text in topics().items()
    ]


def summary(doc: str) -> str | None:
    """The first sentences of a docstring that fit in 200 characters, ending as a sentence; None if it has none."""
    paragraphs = doc.split("\n\n")
    if len(paragraphs) > 1 and re.fullmatch(r"[\w.]+\(.*\)(\s*->.*)?\.?", paragraphs[0], re.DOTALL):
        paragraphs = paragraphs[1:]  # a signature written by hand comes before the prose
    if NOT_PROSE.search(paragraphs[0]):
        return None
    text = ""
    for sentence in SENTENCE_END.split(" ".join(paragraphs[0].split())):
        if sentence[-1:].isalnum():
            sentence += "."  # one-line docstrings often go without
        longer = f"{text} {sentence}".strip()
        if len(longer) > 200 or not longer.endswith((".", "!", "?")):
            break
        text = longer
    return text if len(text.split()) >= 3 and not text.endswith("..") else None


def _parameter_names(call: str) -> str:
    """``(a: int, *, b=1)`` -> ``a, *, b``."""
    function = ast.parse(f"def f{call}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    function.args.defaults, function.args.kw_defaults = [], [None] * len(function.args.kwonlyargs)
    return ast.unparse(function.args)


def _facts(entry: Entry) -> Iterator[tuple[str, str, str, str]]:
    """(kind, instruction, input, output) of everything an entry can teach."""
    path, told = f"{entry.module}.{entry.qualname}".rstrip("."), summary(entry.doc)
    call = f"({entry.signature})" if entry.kind in ("function", "method") else ""
    if told:
        kind = "module" if entry.kind == "module" else "describe"
        verb = "is this {} for" if entry.kind in ("module", "class") else "does this {} do"
        yield kind, f"What {verb.format(entry.kind)}?", path + call, told
    if call and told:
        yield "signature", "Write the signature.", f"{entry.name}: {told}", entry.name + call
        yield "name", f"Name the {entry.kind}.", told, entry.name
    if call:
        names = _parameter_names(call)
        if names and names != entry.signature:  # else it would be a mere copy
            yield "parameters", "List the parameters.", f"def {entry.name}{call}", names
    if entry.kind == "method":
        yield "class_of", "Which class has this method?", path + call, entry.qualname.split(".")[-2]
    elif entry.kind != "module":
        yield "import", "Write the import.", path, f"from {entry.module} import {entry.name}"
        if len(_read()[1][entry.name]) == 1:  # also counting modules that do not document it
            yield "module_of", "Which module defines this name?", entry.name, entry.module


@lru_cache(maxsize=1)
def _triples() -> tuple[tuple[Entry, str, str, str], ...]:
    """The chosen facts: unambiguous, short enough, within the quotas, in the order of the entries."""
    found: dict[tuple[str, str], tuple[Entry, str, str]] = {}
    outputs: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in (entry for entry in entries() if entry.public):
        for kind, instruction, given, output in _facts(entry):
            if len(given) <= 240 and len(output) <= 200:
                found.setdefault((instruction, given), (entry, kind, output))
                outputs[instruction, given].add(output)
    # By hash, not by position: the quota of a kind is spread over all modules.
    drawn = sorted(found, key=lambda pair: hashlib.sha256("\0".join(pair).encode()).digest())
    taken: Counter[str] = Counter()
    chosen = set()
    for pair in drawn:
        kind = found[pair][1]
        if len(outputs[pair]) == 1 and taken[kind] < QUOTAS[kind]:
            taken[kind] += 1
            chosen.add(pair)
    return tuple((entry, *pair, output) for pair, (entry, _, output) in found.items() if pair in chosen)


def triples() -> list[Record]:
    """Instruction, input and output, some 8,500, about the public names; grouped by module like `texts`."""
    return [
        Record(
            {"instruction": instruction, "input": given, "output": output},
            f"python_help:{entry.module}.{entry.qualname}".rstrip("."),
            entry.module,
        )
        for entry, instruction, given, output in _triples()
    ]


def words(min_length: int = 3, max_length: int = 8) -> list[str]:
    """Distinct plain lower-case words, sorted, that stand at least 5 times in the documentation's prose."""
    counts: Counter[str] = Counter()
    for text in (*(entry.doc for entry in entries()), *topics().values()):
        counts.update(WORD.findall(text))
    return sorted(
        word
        for word, number in counts.items()
        if number >= 5
        and min_length <= len(word) <= max_length
        and set(word) & set("aeiou")
        and len(set(word)) > 1
    )
