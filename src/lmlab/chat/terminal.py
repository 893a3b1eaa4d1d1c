"""A conversation in the terminal: lines in, answers as they are written, a few commands that begin with a slash."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lmlab.chat.choice import check_seed, chosen_sampler, common_settings
from lmlab.chat.dialogue import MEMORY, Dialogue
from lmlab.config.named import sampler_names
from lmlab.records import RunFailedError, UserError
from lmlab.registry import suggest
from lmlab.tracking.values import writable

if TYPE_CHECKING:
    from lmlab.generation.samplers import SamplerConfig

HELP = """\
/reset               begin anew
/system TEXT         a system message before the conversation (without TEXT: none)
/sampler NAME k=v    how answers are drawn, e.g. /sampler top_p_temperature temperature=0.7; max_new_tokens and
                     the constraints stay with another NAME, and everything but k without NAME
/adapter NAME        another adapter, or base for the model without any
/seed N              of the next answer; the one after it has N + 1
/quit                end (so does Ctrl-D); Ctrl-C stops an answer, or ends
A message that begins with a slash: write two."""


QUOTED = r'"(?:\\.|[^"\\])*"|\'[^\']*\''
WORD = re.compile(rf"(?:{QUOTED}|\[(?:{QUOTED}|[^\]\"'])*\]|\S)+")
"""What blanks set apart, where they stand outside quotes and YAML lists."""


class Terminal:
    """The conversation's state and its commands.

    Args:
        read: asks for a line, EOFError at the end.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        *,
        sampler: SamplerConfig,
        seed: int,
        system: str | None = None,
        adapter: str | None = None,
        read: Callable[[str], str] = input,
    ) -> None:
        self.dialogue, self.sampler, self.seed, self.system = dialogue, sampler, seed, system
        self.adapter, self._read = adapter, read
        self.turns: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], bool]] = {
            "help": lambda _: self._say(HELP),
            "reset": self._reset,
            "system": self._system,
            "sampler": self._sampler,
            "adapter": self._adapter,
            "seed": self._seed,
            "quit": lambda _: False,
        }

    def run(self) -> int:
        """Talk until the person has enough; the exit code."""
        with contextlib.suppress(
            ImportError
        ):  # not on every system; `input` then has a history and an editor
            importlib.import_module("readline")
        self._say(MEMORY[self.dialogue.memory(self.adapter)])
        self._say("/help lists the commands; /quit ends.")
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._say("")
                return 0
            except KeyboardInterrupt:
                print("\ninterrupted", file=sys.stderr)
                return 130
            try:
                if not self._obey(line):
                    return 0
            except (UserError, RunFailedError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _obey(self, line: str) -> bool:
        if not line.startswith("/") or line.startswith("//"):
            return self._answer(line.removeprefix("/") if line.startswith("//") else line) if line else True
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            fix = suggest(name, [*self._commands])
            raise UserError(f"unknown command '/{name}'", where="command", fix=fix)
        return self._commands[name](rest.strip())

    def _answer(self, message: str) -> bool:
        asked = [*self.turns, {"role": "user", "content": message}]
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            self._write(piece)

        try:
            reply = self.dialogue.reply(
                asked,
                sampler=self.sampler,
                seed=self.seed,
                system=self.system,
                adapter=self.adapter,
                on_text=show,
            )
            text, about = reply.text, reply.about
        except KeyboardInterrupt:
            text, about = "".join(pieces), "stopped"
        self.turns = [*asked, {"role": "assistant", "content": text}]
        self._say(f"\n[{about}; seed {self.seed}]")
        self.seed += 1
        return True

    # --- commands: each gets the rest of its line and says whether to go on ------------------------------------------

    def _reset(self, rest: str) -> bool:
        self.turns = []
        return self._say("the conversation begins anew")

    def _system(self, rest: str) -> bool:
        self.dialogue.check(adapter=self.adapter, system=rest or None)
        self.system = rest or None
        return self._say("system message set" if rest else "no system message")

    def _sampler(self, rest: str) -> bool:
        words = WORD.findall(rest)
        named = bool(words) and "=" not in words[0]
        changes = _settings(words[1:] if named else words)
        if named:
            self.sampler = chosen_sampler({}, words[0], {**common_settings(self.sampler), **changes})
        else:
            self.sampler = chosen_sampler(self.sampler.model_dump(), None, changes)
        told = " ".join(f"{key}={value}" for key, value in self.sampler.model_dump().items())
        return self._say(f"{told}" + ("" if words else f"\n(named ones: {', '.join(sampler_names())})"))

    def _adapter(self, rest: str) -> bool:
        if not rest:
            return self._say(f"adapters: {', '.join(self.dialogue.adapters)}")
        self.dialogue.check(adapter=rest, system=self.system)
        before, self.adapter = self.dialogue.memory(self.adapter), rest
        memory = self.dialogue.memory(rest)
        return self._say(
            f"answers now come from {rest}" + ("" if memory == before else f". {MEMORY[memory]}")
        )

    def _seed(self, rest: str) -> bool:
        try:
            seed = int(rest)
        except ValueError as error:
            raise UserError(f"not a whole number: '{rest}'", where="/seed", fix="e.g. /seed 7") from error
        check_seed(seed, where="/seed")
        self.seed = seed
        return True

    def _write(self, text: str) -> None:
        print(writable(text, sys.stdout.encoding or "utf-8"), end="", flush=True)

    def _say(self, text: str) -> bool:
        self._write(text + "\n")
        return True


def _settings(words: list[str]) -> dict[str, Any]:
    """``["temperature=0.7"]`` -> ``{"temperature": 0.7}``, values as YAML reads them."""
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            raise UserError(f"no value in '{word}'", where="/sampler", fix="write setting=value")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"not a value: '{value}'", where=f"/sampler {name}", fix="e.g. 0.7") from error
    return found
