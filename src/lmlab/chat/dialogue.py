"""A conversation with a trained model: what of it the model is given, and its answers as they are written.

What a model can make of earlier turns is decided by its training. One trained on conversations, or a chat model with a
template of its own, is given all of them through that template; one trained on instructions has only ever seen one at a
time, and one trained on plain text continues what it is given: to both, earlier turns would be something never seen
in training, so they are left out, and `MEMORY` has the words that say so.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmlab.chat.choice import BASE, check_adapter, using
from lmlab.data.chat import chat_prompt
from lmlab.data.chat_templates import RenderChat, chat_renderer
from lmlab.data.fields import BadRecordError
from lmlab.records import UserError

if TYPE_CHECKING:
    from lmlab.generation.samplers import SamplerConfig
    from lmlab.load import UsableModel

Turns = Sequence[dict[str, Any]]
"""``{"role": "user" | "assistant", "content": text}``, the last one the user's."""

MEMORY = {
    "chat": "The whole conversation is sent, through the model's chat template.",
    "instructions": "Trained on single instructions: each message is one, and earlier ones are not sent.",
    "text": "Not trained on conversations: each message is continued as it is, and earlier ones are not sent.",
}


class StoppedError(Exception):
    """Raised inside the decoding loop to end an answer that is no longer wanted."""


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        new_tokens: None of a stopped answer.
        stop_reason: as of `GeneratedText`, or ``stopped``: by the person.
        num_left_out: turns that no longer fit into the model's context, the oldest ones.
    """

    text: str
    new_tokens: int | None
    stop_reason: str
    num_left_out: int = 0

    @property
    def about(self) -> str:
        """A line for the person: how long it is, why it ended, what was left out."""
        ends = {
            "eos": "ended by itself",
            "length": "cut at max_new_tokens",
            "context": "the model's context is full",
            "stop": "a stop string came",
            "complete": "the schema is complete",
            "blocked": "the sampler rules out every token",
            "stopped": "stopped",
        }
        length = (
            ""
            if self.new_tokens is None
            else f"{self.new_tokens} token{'' if self.new_tokens == 1 else 's'}, "
        )
        told = length + ends.get(self.stop_reason, self.stop_reason)
        if self.num_left_out:
            told += f"; the {self.num_left_out} oldest turns no longer fit and were not sent"
        return told


Memory = Literal["chat", "instructions", "text"]


class Dialogue:
    """One model, spoken to by one person at a time.

    Attributes:
        adapters: what can be switched between, ``base`` the last; only that of a model without adapters.
    """

    def __init__(self, usable: UsableModel) -> None:
        self.usable = usable
        self.adapters = (*usable.adapter_names, BASE)
        self._lock = threading.Lock()  # a switch of adapters is one of the whole model
        self._memory: dict[str, Memory] = {}
        for adapter in self.adapters:
            with using(usable, adapter) as view:
                own = view.prompting.template
                self._memory[adapter] = "chat" if _renderer(view) else "instructions" if own else "text"

    def memory(self, adapter: str | None) -> Memory:
        """What of a conversation the model is given with this adapter (None: the first): a key of `MEMORY`."""
        return self._memory[adapter or self.adapters[0]]

    def check(self, *, adapter: str | None, system: str | None) -> None:
        """Raise UserError for an unknown adapter, or a system message and nowhere to put it."""
        if adapter is not None:
            check_adapter(adapter, self.adapters)
        if system and self.memory(adapter) != "chat":
            what = "a system message needs a model trained on conversations"
            raise UserError(what, where="system", fix="leave it out, or train with data.format=messages")

    def reply(
        self,
        turns: Turns,
        *,
        sampler: SamplerConfig,
        seed: int,
        system: str | None = None,
        adapter: str | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Reply:
        """Answer the last turn.

        Args:
            adapter: one of `adapters`; None leaves the model as it was loaded.
            on_text: called with the pieces of the answer as they are written.
            stop: once set, the answer ends with the piece being written.

        Raises:
            UserError: see `fitting_prompt`; an unknown adapter, or a system message and nowhere to put it.
            RunFailedError: the weights have diverged.
        """
        self.check(adapter=adapter, system=system)
        pieces: list[str] = []

        def told(_: int, piece: str) -> None:
            if stop is not None and stop.is_set():
                raise StoppedError
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        with self._lock, using(self.usable, adapter) as view:
            text, left_out = fitting_prompt(view, turns, system, max_new_tokens=sampler.max_new_tokens)
            try:
                (made,) = view.generator([text], sampler=sampler, seeds=[seed], on_text=told)
            except StoppedError:
                return Reply("".join(pieces), None, "stopped", left_out)
        return Reply(made.text, made.new_tokens, made.stop_reason, left_out)

    def stream(self, turns: Turns, *, stop: threading.Event, **settings: Any) -> Iterator[str | Reply]:
        """`reply` in a thread of its own: the pieces as they come, and the `Reply` at the end.

        Whoever stops iterating ends the answer.
        """
        coming: queue.SimpleQueue[str | Reply | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                coming.put(self.reply(turns, on_text=coming.put, stop=stop, **settings))
            except BaseException as error:
                coming.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                item = coming.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Reply):
                    return
        finally:
            stop.set()


def fitting_prompt(
    usable: UsableModel, turns: Turns, system: str | None, *, max_new_tokens: int
) -> tuple[str, int]:
    """The text that answers ``turns``, and how many of the oldest turns were left out to make it fit.

    Room is kept for ``max_new_tokens``, but for no more than a quarter of the context.

    Raises:
        UserError: the last message alone is too long or empty, or the chat template refuses the conversation.
    """
    from lmlab.generation.decode import context_length

    render, limit = _renderer(usable), context_length(usable.generator.model)
    starts = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    reserved = 1 if limit is None else max(1, min(max_new_tokens, limit // 4))
    text, size, start = "", 0, 0
    for start in starts if render is not None else starts[-1:]:
        text = (
            usable.prompting(turns[-1]["content"])
            if render is None
            else _rendered(turns[start:], system, render)
        )
        size = len(usable.generator.encode(text))
        if limit is None or size + reserved <= limit:
            break
    if size == 0:
        raise UserError("the message has no tokens", where="message", fix="write something")
    if limit is not None and size >= limit:
        what = f"the message has {size} tokens with its template and the model's context is {limit}"
        raise UserError(what, where="message", fix="shorten it")
    return text, start if render is not None else 0


def _renderer(usable: UsableModel) -> RenderChat | None:
    """The chat template of a model trained on conversations; of others' models, which do not say, their tokenizer's."""
    if usable.prompting.render_chat is not None or usable.info:
        return usable.prompting.render_chat
    return chat_renderer(usable.tokenizer)


def _rendered(turns: Turns, system: str | None, render: RenderChat) -> str:
    head = [{"role": "system", "content": system}] if system else []
    try:
        return chat_prompt([*head, *turns], render)
    except BadRecordError as error:
        fix = "leave the system message out, or begin anew"
        raise UserError(str(error), where="message", fix=fix) from error
