"""Every command in README.md and docs/*.md: all are read and checked, and most are run as they stand, scaled down.

A command that no rule covers fails, so a new one in the pages cannot go untested. ``ONLY_READ`` lists those that are
checked up to their arguments and not run, each with its reason; `test_extend` runs those of docs/extend.md whole.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .pages import PAGES, ROOT, Command, all_commands, all_inline_commands, anchors_in, links_in
from .shell import run, words_of, workspace

# --- what stands for what -------------------------------------------------------------------------------------------

OPTIONAL = re.compile(r"\[more \.\.\.\]|\[(--[^\]]+)\]")
MODEL = "assets/tiny-base"
STANDS_FOR = {
    "RUN_OR_MODEL": "outputs/sft/my-run",
    "RUN_DIR": "outputs/sft/my-run",
    "MODEL_OR_RUN": "outputs/sft/my-run",
    "RUN": "outputs/sft/my-run",
    "MODEL": MODEL,
    "outputs/sft/NAME": "outputs/sft/my-run",
    "outputs/sft/OTHER": "outputs/sft/other",
    "outputs/sft/A": "outputs/sft/my-run",
    "outputs/sft/B": "outputs/sft/other",
    "outputs/sweeps/NAME": "outputs/sweeps/two",
    "outputs/tokenizers/NAME/1-512-gpt2": MODEL,
    "TEXT.txt": "tinyshakespeare.txt",
    "--data DATA": "--data val",
    "--data FILE": "--data tinyshakespeare.txt",
    "FILE": "tinyshakespeare.txt",
    "FIRST_NODE": "localhost",
    "PORT": "29500",
    "PROJECT": "lmlab",
    "ENTITY": "someone",
}
"""Words in capitals, and names of runs that the reader is to have, by what a fixture made."""


def filled(text: str, *, model: str = MODEL) -> str:
    """The command with its placeholders filled; ``...`` at its end, for settings that are left to the reader, goes."""
    text = OPTIONAL.sub(lambda found: found[1] or "", text.replace(".venv/bin/python", "python"))
    for word in ("DIR", "PATH"):  # of a model; of an output any name will do
        text = re.sub(rf"(name_or_path=){word}\b", rf"\1{model}", text)
        text = re.sub(rf"(--to ){word}\b", r"\1outputs/made", text)
    for word, stands_for in STANDS_FOR.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(word)}(?![\w-])", stands_for, text)
    text = re.sub(r"(name_or_path=)\.\.\.", rf"\1{model}", text)
    return re.sub(r"( \.\.\.)+(?=\s*($|#))", "", text)


# --- rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnlyRead:
    """Commands that are read and checked, and not run."""

    pattern: str
    reason: str


ONLY_READ = (
    OnlyRead(r"^make ", "installs from the network, or is this suite; .ci/run and a person's first hour run them"),
    OnlyRead(r"^pip install", "needs the network"),
    OnlyRead(r"^wandb (sweep|agent)", "needs an account; tests/integration/test_wandb_sweeps.py runs agents offline"),
    OnlyRead(r"^optuna-dashboard|^tensorboard", "serves until it is stopped"),
    OnlyRead(r"^(torchrun|srun|sbatch)\b|trainer\.num_nodes=|SLURM", "needs several machines; tests/integration/test_nodes.py has two groups of processes on this one"),
    OnlyRead(r"trainer\.devices=[3-9]|strategy=fsdp", "needs GPUs; tests/training/test_sharding.py shares two processes"),
    OnlyRead(r"trainer=(gpu|fsdp|ddp)|launcher=slurm|accelerator=gpu|experiment=\w*(gb|gpu)\w*", "needs a GPU or a cluster; tests/**/*gpu*.py run there"),
    OnlyRead(r"plan\.py --table|experiment=nodes_64|model=(scratch/)?qwen3", "minutes, or the network; tests/config/test_presets.py composes and plans presets"),
    OnlyRead(r"benchmarks/", "takes minutes to hours; `make bench` runs them"),
    OnlyRead(r"(?<!if )--(web|serve)\b", "serves until it is stopped; tests/chat/test_page.py and the tests of tracking open the pages"),
    OnlyRead(r"scripts/workspace\.py|--wandb-artifact", "needs an account; tests/tracking/test_workspace.py has a server of its own"),
    OnlyRead(r"(generate|chat|evaluate|export)\.py (?!assets/|outputs/|exports/)[\w-]+/[\w.-]+|\.py gpt2\b|(tokenizer|path)[= ](gpt2|(?!assets/|outputs/|corpus/)[\w-]+/[A-Z][\w.-]+)\b|data=hub|data\.name=", "a name on the hub needs the network"),
    OnlyRead(r"--suite (?!my_task)|suites=\[(?!my_task)", "tasks of the harness download their data"),
    OnlyRead(r"scripts/(demo|build_tiny_base)\.py", "minutes; the README's examples are its steps, and tests/integration/test_tiny_base.py looks at what was built"),
    OnlyRead(r"LLAMA_CPP|ollama|vllm|--gguf", "needs a program that is not installed here; tests/export/test_elsewhere.py"),
    OnlyRead(r"^(git|cd|export|ray|docker|jupyter)\b|^\. ", "a line for the reader's shell, or for another program"),
    OnlyRead(r"^python -m tests\.", "rewrites a page; a test holds the page against it"),
    OnlyRead(r"s3://|ray_address|--ray\b|engine=ray", "needs a server or a cluster; the tests of data start one"),
)  # fmt: skip

SHORT = (
    *(
        "trainer.max_steps=2",
        "trainer.val_every_n_steps=2",
        "trainer.batch_size=2",
        "trainer.accelerator=cpu",
    ),
    *("trainer.memory_plan=false", "output_root=trained", "logger=none", "samples.prompts=1"),
    *("metrics=none", "optim.warmup_steps=1"),
)
"""Appended to train.py's overrides: the same run in seconds, beside those that the fixture made."""


@dataclass(frozen=True)
class Runs:
    """Commands that are run, with words appended.

    Attributes:
        code: exit codes that mean that the command did its work.
    """

    pattern: str
    append: tuple[str, ...] = ()
    code: tuple[int, ...] = (0,)
    without: str = ""


RUNS = (
    Runs(r"experiment=ablate_adapters", (*SHORT, "adapter=none,lora", "quant=none", "seed=1", "data.num_records=60")),
    Runs(r"hparams_search=optuna", (*SHORT, "hparams_search.n_trials=2", "data=skills", "data.num_records=60"), without="trainer.batch_size=2"),
    Runs(r"^python train\.py -m .*quant=none,fp16", (*SHORT, "adapter=lora", "quant=none,nf4", "data=skills", "data.num_records=60")),
    Runs(r"^python train\.py .*(-m|--multirun)\b.*experiment=skills", (*SHORT, "adapter=none,lora", "seed=1", "data.num_records=60")),
    Runs(r"^python train\.py .*(-m|--multirun)\b", (*SHORT, "seed=1", "data=skills", "data.num_records=60")),
    Runs(r"^python train\.py\b.* --?(help|cfg|hydra-help|info)\b"),
    Runs(r"^python train\.py .*(data|experiment)=skills", (*SHORT, "data.num_records=60")),
    Runs(r"^python train\.py\b.*callbacks\.harness", (*SHORT, "data=skills", "data.num_records=60", "callbacks.harness.every_n_steps=null", "callbacks.harness.limit=2")),
    Runs(r"^python train\.py\b", SHORT),
    Runs(r"^python scripts/train_tokenizer\.py .*-m\b", ("output_root=trained", "lab.max_chars=20000", "tokenizer.max_chars=200000")),
    Runs(r"^python scripts/train_tokenizer\.py\b", ("output_root=trained", "overwrite=true")),
    Runs(r"^python scripts/check\.py\b(?!.*outputs/)", ("data=skills", "data.num_records=60", "trainer.batch_size=2", "data.max_length=64")),
    Runs(r"^python scripts/check\.py\b"),
    Runs(r"^python scripts/plan\.py\b"),
    Runs(r"^python scripts/evaluate\.py .*--data val", ("--answers", "2")),
    Runs(r"^python scripts/evaluate\.py\b", ("--limit", "4", "--answers", "2")),
    Runs(r"python scripts/generate\.py\b", ("--max-new-tokens", "4")),
    Runs(r"^python scripts/chat\.py\b"),
    Runs(r"^python scripts/export\.py\b(?!.*--verify)", ("--overwrite",)),
    Runs(r"^python scripts/(export|report|reproduce)\.py\b", code=(0, 1)),
    Runs(r"^python scripts/tokenize_corpus\.py\b", ("--overwrite",)),
    Runs(r"^python scripts/\w+\.py --help$"),
    Runs(r"^python -m pytest\b"),
    Runs(r"^python -m lmlab\.worker\b"),
    Runs(r"^python -c\b"),
)  # fmt: skip


def rule_of(command: Command) -> OnlyRead | Runs | None:
    """The first rule whose pattern is found in the command, if there is one."""
    text = filled(command.text)
    return next((rule for rule in (*ONLY_READ, *RUNS) if re.search(rule.pattern, text)), None)


def rule_for(command: Command) -> OnlyRead | Runs:
    """As `rule_of`.

    Raises:
        AssertionError: there is none: write one, or spell the command like its kin.
    """
    rule = rule_of(command)
    assert rule is not None, f"{command}\nmatches no rule of tests/docs/test_commands.py: add one"
    return rule


COMMANDS = [command for command in all_commands() if command.page != "docs/extend.md"]
OWN = re.compile(r"my_(conf|lab|package)")
"""The reader's own, as in docs/extend.md."""
INLINE = [command for command in all_inline_commands() if not OWN.search(command.text)]


def test_the_pages_have_commands() -> None:
    pages = {command.page for command in COMMANDS}
    assert len(COMMANDS) > 40
    assert {"README.md", "docs/guide.md", "docs/evaluation.md"} <= pages
    with pytest.raises(AssertionError, match="matches no rule"):
        rule_for(Command("x.md", 1, "python scripts/nowhere.py"))


# --- read: every command ----------------------------------------------------------------------------------------------


class Accepted(BaseException):
    """The arguments were read without an error; nothing is to follow."""


@pytest.fixture
def accepts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], None]:
    """``accepts(words)``: the script's own parser takes its arguments, or Hydra and pydantic its overrides."""
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from lmlab.config import compose

    own_app, own_parse = compose.run_app, argparse.ArgumentParser.parse_args

    def validated(function: Any, **more: Any) -> int:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", own_parse)  # Hydra's flags are read by one
        if more.get("sweeps", True):
            sys.argv = [sys.argv[0], *_one_point(sys.argv[1:])]
        if any(word in ("--help", "--cfg", "--hydra-help", "--info", "-sc") for word in sys.argv):
            raise Accepted
        GlobalHydra.instance().clear()

        def check_config(composed: Any, told: list[str]) -> int:
            of_a_run = [key for key in composed if key != more.get("own")]
            compose.to_run_config(OmegaConf.masked_copy(composed, of_a_run))
            return 0

        if own_app(check_config, **more):
            raise AssertionError(capsys.readouterr().err)
        raise Accepted

    def parsed(self: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        own_parse(self, *args, **more)
        raise Accepted

    def of_run(path: Path) -> Any:
        raise Accepted

    monkeypatch.setattr(compose, "run_app", validated)
    monkeypatch.setattr(compose, "load_frozen", of_run)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def check(words: list[str]) -> None:
        script = ROOT / words[0]
        assert script.is_file(), f"no {words[0]}"
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        monkeypatch.setattr(sys, "argv", list(words))
        monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Accepted:
            return
        except SystemExit as error:
            if not error.code and any(word in ("--help", "-h") for word in words):
                return
            raise AssertionError(f"{' '.join(words)}: {capsys.readouterr().err}") from error
        raise AssertionError(f"{' '.join(words)}: neither argparse nor Hydra read the arguments")

    return check


def _one_point(words: list[str]) -> list[str]:
    """The first point of a sweep; other command lines as they are."""
    if not {"-m", "--multirun"} & set(words):
        return words
    from hydra.core.override_parser.overrides_parser import OverridesParser

    point = []
    for word in words:
        if word in ("-m", "--multirun"):
            continue
        if word.startswith("-"):
            point.append(word)
            continue
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override():
            if override.is_interval_sweep():
                first = str(override.value().start)  # type: ignore[union-attr]
            else:
                first = next(iter(override.sweep_string_iterator()))
            word = f"{override.key_or_group}={first}"
        point.append(word)
    return point


def check_words(command: Command, accepts: Callable[[list[str]], None]) -> None:
    """Whatever program it is, what can be known of its arguments is held against them."""
    text = filled(command.text)
    words = words_of(text)
    if not words:  # export, cd, git: a line for the reader's shell
        assert re.match(r"^(git|cd|export|ray|docker|jupyter|\.)\b|^\. ", text), f"{command}: not understood"
        return
    program, *arguments = words
    if program == "python" and arguments[:1] and arguments[0].endswith(".py"):
        accepts(arguments)
    elif program == "python" and arguments[:1] == ["-m"]:
        importlib.import_module(arguments[1])
    elif program == "python":
        assert arguments[0] == "-c"
        compile(arguments[1], "-c", "exec")
    elif program == "make":
        targets = re.findall(
            r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        named = [word for word in arguments if "=" not in word]
        assert set(named) <= set(targets), f"{command}: the Makefile has {targets}"
    elif program in ("torchrun", "srun"):
        if arguments and arguments != ["train.py"]:  # which a page warns of
            assert "-m lmlab.worker" in " ".join(arguments), f"{command}: starts no worker"
        if program == "torchrun" and "-m" in arguments:
            from torch.distributed.run import get_args_parser

            told, _ = get_args_parser().parse_known_args(arguments)
            assert (told.module, told.training_script) == (True, "lmlab.worker")
    elif program == "pip":
        extras = re.findall(r"lmlab\[([\w,]+)\]", text)
        known = re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
        assert {name for told in extras for name in told.split(",")} <= set(known), command
    elif program == "wandb" and arguments[0] == "sweep":
        assert (ROOT / arguments[1]).is_file(), command


@pytest.mark.parametrize(
    "text",
    [
        "python train.py optim.lrr=1",
        "python train.py adapter=loar",
        "python train.py -m adapter=loar,none",
        "python scripts/nowhere.py",
        "python scripts/plan.py trainer.devices=none",
        "python scripts/plan.py -m adapter=lora,qlora",
        "python scripts/check.py data=skils",
        "python scripts/train_tokenizer.py tokenizer.vocab_sizes=512",
        "python scripts/generate.py assets/tiny-base --promt x",
        "python scripts/report.py",
        "torchrun --nproc-per-node 2 scripts/plan.py",
        "make everything",
        "pip install 'lmlab[everything]'",
        "wandb sweep conf/sweep/nowhere.yaml",
    ],
)
def test_a_slip_in_a_command_is_found(text: str, accepts: Callable[[list[str]], None]) -> None:
    with pytest.raises(AssertionError):
        check_words(Command("x.md", 1, text), accepts)


def name_of(command: Command) -> str:
    return f"{Path(command.page).stem}-{command.line}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, marks=() if page == "README.md" else pytest.mark.slow
        )  # each composes every command
        for page in sorted({command.page for command in COMMANDS})
    ],
)
def test_every_command_of_a_page_is_read(page: str, accepts: Callable[[list[str]], None]) -> None:
    wrong = []
    for command in (command for command in COMMANDS if command.page == page):
        try:
            rule_for(command)
            check_words(command, accepts)
        except AssertionError as error:
            if not command.error:
                wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_commands_in_running_text_are_read(accepts: Callable[[list[str]], None]) -> None:
    wrong = []
    for command in INLINE:
        try:
            rule_for(command)
            check_words(command, accepts)
        except (AssertionError, ModuleNotFoundError) as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


# --- run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages take for granted: runs, a sweep, texts, prompts, tasks."""
    folder = workspace(tmp_path_factory.mktemp("desk") / "work")
    _write_texts(folder)
    small = "data=skills data.num_records=60 metrics=none logger=none trainer.accelerator=cpu trainer.batch_size=2 "
    small += "trainer.max_steps=4 trainer.val_every_n_steps=2 checkpoint.every_n_steps=2 checkpoint.keep=2 samples.prompts=1"
    _must(f"python train.py {small} run_name=my-run", folder)
    _must(f"python train.py {small} run_name=other seed=2", folder)
    for name in ("skills", "first", "second", "packed"):
        shutil.copytree(folder / "outputs/sft/my-run", folder / "outputs/sft" / name)
    pretrain = small.replace("data=skills data.num_records=60", "data=text data.path=tinyshakespeare.txt")
    _must(
        f"python train.py task=pretrain {pretrain} run_name=mine tokenizer.vocab_size=300 data.max_length=512",
        folder,
    )
    for name, source in (("gpt2_dir", "assets/tiny-base"), ("my_run", "outputs/pretrain/mine")):
        shutil.copytree(folder / source, folder / name)
    _must(f"python train.py -m {small} run_name=two adapter=none,lora", folder)
    _must("python scripts/export.py outputs/sft/my-run --to exports/my-model", folder)
    _must(
        "python scripts/tokenize_corpus.py books more.jsonl.gz --tokenizer assets/tiny-base --to corpus",
        folder,
    )
    return folder


def _write_texts(folder: Path) -> None:
    text = "".join(
        f"Speaker {n % 7}:\nLine {n} of a play, and {n * n} are its words.\n\n" for n in range(600)
    )
    for name in ("tinyshakespeare.txt", "shakespeare.txt", "corpus.txt", "text.txt"):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "books").mkdir()
    for n in range(3):
        (folder / "books" / f"{n}.txt").write_text(text[n * 100 :], encoding="utf-8")
    with gzip.open(folder / "more.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text[n * 50 : n * 50 + 400]}) + "\n" for n in range(20))
    for name in ("code", "languages"):
        lines = "".join(
            json.dumps({"text": f"{name} {n}: " + text[n * 50 : n * 50 + 200]}) + "\n" for n in range(9)
        )
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    prompts = "".join(
        json.dumps({"prompt": f"Say the first word. {word} two"}) + "\n" for word in ("one", "red")
    )
    (folder / "asked.jsonl").write_text(prompts, encoding="utf-8")
    triples = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(80)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in triples), encoding="utf-8")
    (folder / "tasks").mkdir()
    questions = [{"question": f"{n} + 1 =", "choices": [str(n + 1), "x"], "label": 0} for n in range(4)]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "tasks/questions.jsonl").write_text(lines, encoding="utf-8")
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    task = re.search(r"^    task: my_task\n(?:    .*\n)+", page, flags=re.MULTILINE)
    assert task is not None
    (folder / "tasks/my_task.yaml").write_text(
        re.sub(r"^    ", "", task[0], flags=re.MULTILINE), encoding="utf-8"
    )


def _must(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])


def appended(rule: Runs, text: str) -> Iterator[str]:
    """The rule's words, but for settings that would contradict the command's own."""
    for word in rule.append:
        if word == "trainer.max_steps=2" and "trainer.max_epochs" in text:
            continue
        if word == rule.without:
            continue
        yield word
    if rule.append and text.startswith("python train.py") and "resume=" not in text and "-m " not in text:
        yield "overwrite=true"


RUN_HERE = list(
    {
        re.sub(r"\s+#.*$", "", filled(command.text)): command
        for command in (*INLINE, *COMMANDS)
        if isinstance(rule_of(command), Runs) and command.text != "python train.py -m"
    }.values()
)
"""Each once, however often the pages have it."""


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE, ids=name_of)
def test_a_command_runs(command: Command, desk: Path) -> None:
    rule = rule_for(command)
    assert isinstance(rule, Runs)
    text = filled(command.text, model="outputs/pretrain/mine" if "=sft" in command.text else MODEL)
    done = run(text, desk, append=[] if command.error else list(appended(rule, text)))
    told = f"{command}\n{shlex.join(appended(rule, text))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if command.error:  # the page shows what is said of a slip
        assert done.returncode in (1, 2), told
        assert command.error.removesuffix("...") in done.stderr, told
        return
    assert done.returncode in rule.code, told
    assert "Traceback" not in done.stderr, told


# --- links ------------------------------------------------------------------------------------------------------------

ANCHORS = {page: anchors_in(page.read_text(encoding="utf-8")) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = []
    for link in links_in(text):
        if re.match(r"[a-z]+:", link):
            continue  # the web cannot be asked here
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in ANCHORS.get(target, {anchor})):
            wrong.append(link)
    named = re.findall(
        r"(?<![\w/.-])((?:docs|scripts|benchmarks|conf|tests|notebooks|src/lmlab)/[\w./-]*\.(?:md|py|ipynb|yaml))",
        text,
    )
    wrong += [name for name in set(named) if not (ROOT / name).exists()]
    assert not wrong, f"{page.name}: {wrong}"
