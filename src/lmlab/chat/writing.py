"""Many prompts under one or several samplers, batch by batch: what is done is handed on before the next batch begins."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from lmlab.chat.prompts import Asked
from lmlab.lines import plain
from lmlab.records import UserError
from lmlab.tracking.values import writable

if TYPE_CHECKING:
    from lmlab.generation.samplers import SamplerConfig
    from lmlab.load import UsableModel


def full_prompts(usable: UsableModel, asked: Sequence[Asked], *, system: str | None, raw: bool) -> list[str]:
    """What the model is given for each prompt, checked to leave room for an answer.

    Args:
        raw: the prompts as they are, without the template of the model's training.

    Raises:
        UserError: of the first prompt that is too long or empty, naming its line.
    """
    from lmlab.generation.decode import context_length

    limit = context_length(usable.generator.model)
    found = []
    for one in asked:
        if raw and one.system is not None:
            raise UserError("a system message with --raw", where=one.where, fix="leave one of them out")
        own = one.system if one.system is not None else system
        try:
            text = one.text if raw else usable.prompting(one.text, system=own)
        except UserError as error:
            raise UserError(error.what, where=one.where, fix=error.fix) from error
        size = len(usable.generator.encode(text))
        if size == 0:
            raise UserError("the prompt has no tokens", where=one.where, fix="give it some text")
        if limit is not None and size >= limit:
            what = f"the prompt has {size} tokens and the model's context is {limit}"
            raise UserError(what, where=one.where, fix=f"shorten it to at most {limit - 1} tokens")
        found.append(text)
    return found


def write_texts(
    usable: UsableModel,
    asked: Sequence[Asked],
    full: Sequence[str],
    *,
    samplers: Mapping[str, SamplerConfig],
    seed: int,
    batch_size: int,
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Every prompt under every sampler, one batch after the other.

    Args:
        full: what the model is given, see `full_prompts`.
        samplers: name -> sampler.
        seed: of the first prompt; the next has seed + 1, whatever the batches are.
        on_text: called with (prompt index, piece of its text) as it is written.

    Yields:
        The rows of one batch.
    """
    generator = usable.generator
    num_batches = -(-len(asked) // batch_size)
    steps = sum(sampler.max_new_tokens for sampler in samplers.values()) * num_batches
    # Once around all batches: getting a model ready to decode (an adapter merged, say) may cost more than one batch.
    with generator.around(steps):
        within = replace(generator, around=nullcontext, batch_size=batch_size)
        for name, sampler in samplers.items():
            for start in range(0, len(asked), batch_size):
                seeds = [seed + index for index in range(start, min(start + batch_size, len(asked)))]
                told = None if on_text is None else (lambda i, piece, start=start: on_text(start + i, piece))
                texts = within(
                    full[start : start + batch_size], sampler=sampler, seeds=seeds, on_text=told, entropy=True
                )
                yield [
                    {
                        **one.carried,
                        "prompt": one.text,
                        "sampler": name,
                        "seed": own_seed,
                        "text": text.text,
                        "new_tokens": text.new_tokens,
                        "stop_reason": text.stop_reason,
                        "mean_entropy": text.mean_entropy,
                    }
                    for one, own_seed, text in zip(
                        asked[start : start + batch_size], seeds, texts, strict=True
                    )
                ]


ROW = ("prompt", "sampler", "seed", "text", "new_tokens", "stop_reason", "mean_entropy")
"""The fields of an output line, before which come those that its prompt's line carried."""


class Output:
    """Where texts go: a file of JSON lines, complete up to the batch it was interrupted in, or the terminal.

    Args:
        file: tried at once, so that a place that cannot be written to is known before a model is loaded; what it holds
            is replaced when the first text comes.
        streams: texts come by `piece` while they are written, the rows only end them.

    Raises:
        UserError: the file cannot be made.
    """

    def __init__(self, file: str | None, *, streams: bool) -> None:
        self.file, self.streams = file, streams and file is None
        self._done, self._begun = 0, False
        self._headings: list[str] = []
        try:
            if file is not None:
                os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o666))
        except OSError as error:
            raise self._unwritable(error) from error

    def write(
        self,
        batches: Iterator[list[dict[str, Any]]],
        *,
        asked: Sequence[Asked],
        full: Sequence[str],
        samplers: Sequence[str],
    ) -> int:
        """Take all batches; the exit code.

        Raises:
            UserError: the disk is full.
        """
        total = len(asked) * len(samplers)
        self._headings = [
            (f"[{name}]\n" if len(samplers) > 1 else "") + (given if given == one.text else f"> {one.text}\n")
            for name in samplers
            for one, given in zip(asked, full, strict=True)
        ]
        progress = self.file is not None and sys.stderr.isatty()
        try:
            with ExitStack() as stack:
                lines: IO[str] | None = None
                for rows in batches:
                    if self.file is not None and lines is None:  # only now is what it held before replaced
                        lines = stack.enter_context(
                            open(self.file, "w", encoding="utf-8", errors="backslashreplace")
                        )
                    for row in rows:
                        self._row(row, lines)
                    if progress:
                        print(f"\r{self._done} of {total}", end="", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"\ninterrupted: {self._done} of {total} texts are written", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13
        except OSError as error:
            raise self._unwritable(error) from error
        if self.file is not None:
            print("\n" * progress + self.file)
        return 0

    def piece(self, index: int, piece: str) -> None:
        """Show a piece of the text being written."""
        self._begin()
        self._print(piece)

    def _begin(self) -> None:
        if not self._begun:
            self._print(self._headings[self._done])
        self._begun = True

    def _row(self, row: Mapping[str, Any], lines: IO[str] | None) -> None:
        if lines is not None:
            lines.write(json.dumps(plain(row), ensure_ascii=False) + "\n")
            lines.flush()
        else:
            self._begin()
            self._print(("" if self.streams else row["text"]) + "\n")
        self._done, self._begun = self._done + 1, False

    def _print(self, text: str) -> None:
        print(writable(text, sys.stdout.encoding or "utf-8"), end="", flush=True)

    def _unwritable(self, error: OSError) -> UserError:
        fix = "choose another file, or make room"
        return UserError(f"cannot be written: {error.strerror}", where=self.file or "output", fix=fix)
