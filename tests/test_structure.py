"""The house rules that no linter knows: import directions, who may import Lightning, security floors, clean files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
FILES = sorted(SRC.rglob("*.py"))

LAYERS = [  # design.md section 2, bottom up; a row's members never import one another unless they may
    {"records", "registry", "lines", "journal", "modes", "remote", "hub"},
    {"data", "tokenizers", "models", "generation", "tracking"},
    {"evaluation", "export"},
    {"training"},
    {"config"},
    {
        "announce",
        "worker",
        "start",
        "checks",
        "evaluate",
        "measured",
        "variants",
        "sweeps",
        "assemble",
        "chat",
        "load",
        "session",
        "resume",
        "planning",
        "plugged",
        "presets",
        "fitting",
        "ranks",
        "reproduce",
        "runs",
        "tokenizer_lab",
        "exporting",
        "certify",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SIBLINGS = LAYERS[1] | LAYERS[2]  # never each other within their row


def module_name(file: Path) -> str:
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """Every module the file imports, at its top or inside functions, `from package import module` resolved."""
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            base = str(node.module)
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else base for member in members}
    return found


def package(module: str) -> str:
    """`lmlab.data.sources` -> `data`."""
    return module.split(".")[1] if module.startswith("lmlab.") else ""


def direction(importer: str, imported: str) -> str | None:
    """Why one package of lmlab must not import another, or None."""
    if importer == imported:
        return None
    if LEVEL[imported] > LEVEL[importer]:
        return f"{importer} imports {imported}, which stands above it"
    if LEVEL[imported] == LEVEL[importer] and importer in SIBLINGS:
        return f"{importer} imports its sibling {imported}"
    return None


def test_the_rule_itself() -> None:
    assert direction("training", "models") is None
    assert direction("worker", "session") is None
    assert direction("registry", "records") is None
    assert direction("models", "data")
    assert direction("evaluation", "export")
    assert direction("training", "config")
    assert direction("config", "start")


def test_every_package_has_its_place() -> None:
    assert {package(module) for module in MODULES} - {""} <= set(LEVEL)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if package(m)))
def test_imports_go_down(module: str) -> None:
    inside = {name for name in imports(MODULES[module]) if package(name)}
    wrong = {direction(package(module), package(name)) for name in inside} - {None}
    assert not wrong


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle as the modules on it, [] if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_cycles() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"], "the search itself"
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []
    graph = {module: (imports(file) & set(MODULES)) - {module} for module, file in MODULES.items()}
    assert sum(len(names) for names in graph.values()) > 50
    assert cycle(graph) == []


def test_only_training_imports_lightning() -> None:
    users = {
        module
        for module, file in MODULES.items()
        if {name.split(".")[0] for name in imports(file)} & {"lightning", "pytorch_lightning"}
    }
    assert users
    assert {package(module) for module in users} == {"training"}


def test_the_package_imports_no_script_or_test() -> None:
    for file in FILES:
        assert not {name.split(".")[0] for name in imports(file)} & {
            "scripts",
            "tests",
            "benchmarks",
            "train",
        }, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SRC).as_posix())
def test_a_module_is_described_and_of_human_size(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert file.stem not in ("utils", "helpers", "util", "common", "misc")
    assert not text or ast.get_docstring(tree(file)), "no docstring"
    assert len(text.splitlines()) <= 400


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function, methods and inner ones too."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize(
    "file", [*FILES, *sorted((ROOT / "scripts").glob("*.py"))], ids=lambda file: file.name
)
def test_functions_are_of_human_size(file: Path) -> None:
    assert [(name, length) for name, length in functions(file) if length > 60] == []


# --- what is installed ----------------------------------------------------------------------------------------------

FLOORS = {"lightning": "2.6.6", "torch": "2.10", "transformers": "5.5", "hydra-core": "1.3.8"}
EXCLUDED = {"lightning": ["2.6.2", "2.6.3"]}  # published with malware, 2026-04-30


def dependencies() -> dict[str, Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {Requirement(text).name: Requirement(text) for text in project["dependencies"]}


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("#")[0].strip().partition("==") for line in lines if line.split("#")[0].strip()]
    assert all(sign == "==" for _, sign, _ in pairs), "every line pins one version"
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, _, version in pairs}


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_security_floors(name: str, floor: str) -> None:
    specifier = dependencies()[name].specifier
    assert specifier.contains(floor)
    major, minor, *rest = (int(part) for part in floor.split("."))
    below = f"{major}.{minor}.{rest[0] - 1}" if rest else f"{major}.{minor - 1}.99"
    assert not specifier.contains(below)


@pytest.mark.parametrize("name", EXCLUDED)
def test_bad_releases_are_excluded_by_name(name: str) -> None:
    excluded = {spec.version for spec in dependencies()[name].specifier if spec.operator == "!="}
    assert excluded >= set(EXCLUDED[name])


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    pinned = constraints()
    for name, requirement in dependencies().items():
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is outside {requirement}"


def test_the_makefile_installs_the_pinned_torch() -> None:
    told = re.findall(r"torch==([\w.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {Version(version) for version in told} == {constraints()["torch"]}


# --- files ----------------------------------------------------------------------------------------------------------


def test_env_example_names_exactly_the_variables_lmlab_reads() -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if line.strip() and not line.startswith("#")]
    assert {line.partition("=")[0] for line in settings} == {
        "WANDB_API_KEY",
        "WANDB_PROJECT",
        "WANDB_ENTITY",
        "HF_TOKEN",
        "HF_HOME",
        "LMLAB_OUTPUT_ROOT",
        "LMLAB_CACHE",
        "LMLAB_TEST_DATA",
    }
    assert all(not line.partition("=")[2].partition("#")[0].strip() for line in settings), (
        "no values in the example"
    )


HOME_PATH = re.compile(rb"(?<![\w.~$}*-])/(?:work|root|home)/\w")


def test_no_file_knows_this_machine() -> None:
    assert HOME_PATH.search(b'"/' + b'work/main"')
    assert not HOME_PATH.search(b"outputs/work/x ~/work/x")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    assert "train.py" in names
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert [file for file in files if HOME_PATH.search(file.read_bytes())] == []


def test_the_table_of_faults_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)
    assert rows == [str(number) for number in range(1, 35)]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) >= len(rows)
    for file, name in named:
        functions = [node for node in tree(ROOT / "tests" / file).body if isinstance(node, ast.FunctionDef)]
        assert name in {function.name for function in functions}, f"{file}::{name}"
