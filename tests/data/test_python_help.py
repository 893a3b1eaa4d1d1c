"""The embedded corpus: sizes, determinism over processes, balance, nothing imported, no leak over a group split."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from lmlab.data import python_help
from lmlab.records import Record, UserError

PROBE = """
import sys
from lmlab.data import python_help
before = set(sys.modules)
texts, triples = python_help.texts(), python_help.triples()
words, key = python_help.words(), python_help.version_key()
new = sorted(set(sys.modules) - before)
import hashlib, json
rows = [[r.fields, r.where, r.group] for r in texts + triples] + [words, key]
print(json.dumps([hashlib.sha256(json.dumps(rows).encode()).hexdigest(), new]))
"""


@pytest.fixture(scope="module")
def texts() -> list[Record]:
    return python_help.texts()


@pytest.fixture(scope="module")
def triples() -> list[Record]:
    return python_help.triples()


def test_another_process_reads_the_same_and_imports_nothing(
    texts: list[Record], triples: list[Record]
) -> None:
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, check=True, capture_output=True, text=True, timeout=120
    )
    digest, new_modules = json.loads(done.stdout)
    rows = [[r.fields, r.where, r.group] for r in texts + triples]
    rows += [python_help.words(), python_help.version_key()]
    assert digest == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    # sysconfig reads its build data, and the parser needs the codecs that sources declare.
    expected = ("_sysconfigdata", "encodings.")
    assert [name for name in new_modules if not name.startswith(expected)] == []


def test_topics_are_pydocs() -> None:
    from pydoc_data.topics import topics as expected

    assert python_help.topics() == expected
    assert list(python_help.topics()) == sorted(expected)
    assert 200_000 < sum(map(len, expected.values())) < 1_500_000


def test_docstrings_are_the_ones_python_shows() -> None:
    import inspect
    import textwrap

    known = {(entry.module, entry.qualname): entry for entry in python_help.entries()}
    assert known["textwrap", "dedent"].doc == inspect.getdoc(textwrap.dedent)
    assert known["textwrap", "dedent"].kind == "function"
    assert known["textwrap", "dedent"].signature == "text"
    assert known["textwrap", "TextWrapper.wrap"].kind == "method"
    assert known["textwrap", "TextWrapper.wrap"].signature == "self, text"
    assert known["json", ""].doc == inspect.getdoc(json)
    assert known["json.decoder", "JSONDecodeError"].signature == "ValueError"
    assert 1_200_000 < sum(len(entry.doc) for entry in known.values()) < 4_000_000
    assert len(known) == len(python_help.entries())


def test_skipped_folders_are_not_read() -> None:
    parts = {part for entry in python_help.entries() for part in entry.module.split(".")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "pytest", "torch", "lmlab"})
    assert {"argparse", "asyncio", "unittest"} <= parts


def test_text_of_a_module_reads_like_its_source(texts: list[Record]) -> None:
    by_place = {record.where: record for record in texts}
    assert len(by_place) == len(texts) > 500
    text = by_place["python_help:textwrap"].fields["text"]
    assert text.startswith(
        "Module textwrap\n\nText wrapping and filling.\n\nclass TextWrapper\n    Object for"
    )
    assert "\n\ndef TextWrapper.wrap(self, text)\n    wrap(text : string) -> [string]\n" in text
    assert by_place["python_help:topic:assert"].fields["text"] == python_help.topics()["assert"].strip()


def test_triples_are_whole_and_unique(triples: list[Record]) -> None:
    assert 6_000 < len(triples) < 10_000
    pairs = {(record.fields["instruction"], record.fields["input"]) for record in triples}
    assert len(pairs) == len(triples)
    for record in triples:
        assert set(record.fields) == {"instruction", "input", "output"}
        assert all(value and value == value.strip() for value in record.fields.values()), record
        assert len(record.fields["output"]) <= 200
        assert len(record.fields["input"]) <= 240
        assert not any(part.startswith("_") for part in record.where.removeprefix("python_help:").split("."))


def test_no_kind_dominates(triples: list[Record]) -> None:
    def kind(instruction: str) -> str:
        describes = ("What does this", "What is this class")
        return "describe" if instruction.startswith(describes) else instruction.replace("method", "function")

    counts = Counter(kind(record.fields["instruction"]) for record in triples)
    assert len(counts) >= 7
    assert max(counts.values()) <= 0.45 * len(triples)
    assert min(counts.values()) >= 100


def test_answers_are_true(triples: list[Record]) -> None:
    definers: defaultdict[str, set[str]] = defaultdict(set)
    known = {f"{entry.module}.{entry.qualname}": entry for entry in python_help.entries()}
    for entry in known.values():
        definers[entry.qualname].add(entry.module)
    checked: Counter[str] = Counter()
    for record in triples:
        instruction, given, output = record.fields.values()
        entry = known.get(record.where.removeprefix("python_help:"))
        if instruction == "Which module defines this name?":
            assert definers[given] == {output}
        elif instruction == "Write the import.":
            assert output.removeprefix("from ").replace(" import ", ".") == given
        elif instruction == "Which class has this method?":
            assert given.split("(")[0].split(".")[-2] == output
        elif instruction.startswith(("What does", "What is this class")):
            assert entry is not None
            assert output[:-1] in " ".join(entry.doc.split())  # its last full stop may have been added
            assert output[-1] in ".!?"
        elif instruction == "Write the signature.":
            assert entry is not None
            assert output == f"{entry.name}({entry.signature})"
        else:
            continue
        checked[instruction] += 1
    assert len(checked) == 7


def test_parameters_are_the_ones_the_compiler_sees(triples: list[Record]) -> None:
    asked = {
        r.fields["input"]: r.fields["output"]
        for r in triples
        if r.fields["instruction"] == "List the parameters."
    }
    for question, answer in asked.items():
        name = question.split("(")[0].removeprefix("def ")
        compiled = compile(f"{question}: pass", "<question>", "exec").co_consts
        code = next(const for const in compiled if getattr(const, "co_name", None) == name)
        names = [part.strip().lstrip("*") for part in answer.split(",")]
        assert {name for name in names if name not in ("", "/")} == set(code.co_varnames), question
    assert len(asked) > 300


def test_a_split_by_group_cannot_leak(texts: list[Record], triples: list[Record]) -> None:
    group_of_module = {
        r.where.removeprefix("python_help:"): r.group for r in texts if ":topic:" not in r.where
    }
    for record in triples:
        path = record.where.removeprefix("python_help:")
        assert record.group is not None
        assert path == record.group or path.startswith(record.group + ".")
        assert group_of_module[record.group] == record.group
    groups: defaultdict[str, set[str | None]] = defaultdict(set)
    for entry in python_help.entries():
        if len(entry.doc) >= python_help.COPY_LENGTH:
            groups[entry.doc].add(group_of_module[entry.module])
    for record in texts:
        if ":topic:" in record.where:
            for passage in record.fields["text"].split("\n\n"):
                if len(passage.strip()) >= python_help.COPY_LENGTH:
                    groups[passage.strip()].add(record.group)
    assert [passage for passage, found in groups.items() if len(found) > 1] == []
    assert len({record.group for record in triples}) > 300


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the sum of two numbers", "Return the sum of two numbers."),
        ("Join e.g. two paths. Then\nnormalize them.\n\nMore.", "Join e.g. two paths. Then normalize them."),
        ("wrap(text) -> list\n\nWrap a text into lines.", "Wrap a text into lines."),
        ("Wrap a text. " + "Long " * 50 + "tail.", "Wrap a text."),
        ("Use it like this:\n\n>>> f()", None),
        (">>> f()\n1", None),
        ("Internal.", None),
        ("word " * 60 + "end.", None),
    ],
)
def test_summary(doc: str, expected: str | None) -> None:
    assert python_help.summary(doc) == expected


def test_words_are_plain_and_frequent() -> None:
    found = python_help.words()
    assert found == sorted(set(found))
    assert 800 < len(found) < 10_000
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 8 for word in found)
    assert {"list", "value", "return"} <= set(found)
    assert {len(word) for word in python_help.words(4, 5)} == {4, 5}


def test_version_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    key = python_help.version_key()
    version, _, digest = key.partition("-")
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert len(digest) == 16
    sources = list(python_help._sources())
    sources[0] = (sources[0][0], sources[0][1] + b"#")
    monkeypatch.setattr(python_help, "_sources", lambda: tuple(sources))
    assert python_help.version_key() != key


def test_a_python_without_sources_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("no_stdlib")
    monkeypatch.setattr(python_help.sysconfig, "get_paths", lambda: {"stdlib": str(empty)})
    with pytest.raises(UserError, match="no library sources"):
        python_help._sources.__wrapped__()
