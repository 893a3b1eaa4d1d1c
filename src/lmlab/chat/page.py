"""The conversation as a page on this machine: Gradio (the extra ``lmlab[chat]``), on 127.0.0.1 and nowhere else.

Nothing of it leaves the machine: no analytics, no fonts or images from elsewhere (a model's answer is shown as the text it
is, so nothing it writes can load anything), no public link, no record of what was said on disk. Trade-off: one answer is
written at a time, whoever has the page open; a second one waits.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lmlab.chat.choice import check_seed, chosen_sampler, common_settings
from lmlab.chat.dialogue import MEMORY, Dialogue, Reply
from lmlab.config.named import sampler_names
from lmlab.records import RunFailedError, UserError
from lmlab.tracking.values import visible

if TYPE_CHECKING:
    from lmlab.generation.samplers import SamplerConfig

HOST = "127.0.0.1"
SHOW_EVERY = 0.05
"""Seconds between two pictures of a growing answer; a small model writes faster than a browser likes to draw."""

SLIDERS: dict[str, tuple[float, float, float]] = {
    "temperature": (0.0, 2.0, 0.05),
    "top_k": (0, 200, 1),
    "top_p": (0.01, 1.0, 0.01),
    "min_p": (0.0, 1.0, 0.01),
    "typical_p": (0.01, 1.0, 0.01),
    "repetition_penalty": (0.5, 2.0, 0.05),
    "no_repeat_ngram_size": (0, 10, 1),
    "max_new_tokens": (1, 1024, 1),
}
"""Setting -> (lowest, highest, step); a sampler shows those it has."""

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""Where a slider stands for a setting that is null, and what is null again there."""

CSS = """
.gradio-container { max-width: 80rem !important; margin: 0 auto !important; }
#title h2 { margin: 0; } #about p { margin: 0; opacity: .8; }
#chat .message-content .md { white-space: pre-wrap; }
#status, #status * { border: none !important; box-shadow: none; background: none; }
#status textarea { padding: 0 .25rem; font-size: .875rem; opacity: .85; }
"""


def require_gradio() -> None:
    """Raise UserError naming the extra if Gradio is not installed; keep it from calling home if it is."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio", where="--web", fix="pip install 'lmlab[chat]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def free_port(port: int) -> int:
    """``port``, or for 0 one that is free.

    Raises:
        UserError: no port, or it is taken.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"{port} is no port", where="--port", fix="0 (any that is free) to 65535")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as place:
        try:
            place.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # not held up by connections just closed
            place.bind((HOST, port))
        except OSError as error:
            what = f"port {port} cannot be used: {error.strerror}"
            raise UserError(
                what, where="--port", fix="choose another one, or 0 for any that is free"
            ) from error
        return place.getsockname()[1]


def serve(dialogue: Dialogue, *, name: str, port: int, **settings: Any) -> int:
    """Show the page until Ctrl-C; the exit code.

    Args:
        name: what the model was called on the command line.
        settings: see `build_page`.

    Raises:
        UserError: Gradio is missing, or the port is taken.
    """
    require_gradio()
    page = build_page(dialogue, name=name, **settings)
    port = free_port(port)
    try:
        launch(page, port)
        print(f"chat: http://{HOST}:{port} (on this machine only; Ctrl-C ends)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    finally:
        page.close(verbose=False)
    return 130


def launch(page: Any, port: int) -> None:
    """Start the page's server in a thread; what the environment says of sharing, paths or extensions is not asked."""
    import gradio as gr

    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_ROOT_PATH"):  # read also where an argument says none
        os.environ.pop(name, None)
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
    mono = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        inbrowser=False,
        show_error=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=fonts, font_mono=mono),
    )


def build_page(
    dialogue: Dialogue,
    *,
    name: str,
    sampler: SamplerConfig,
    seed: int,
    system: str | None = None,
    adapter: str | None = None,
) -> Any:
    """The page as Gradio blocks.

    Args:
        sampler: what answers are drawn by at first.
        seed: of the first answer; each one after it has the next.
        adapter: in force at first; None: the first.
    """
    return _Page(dialogue, name, sampler).build(seed=seed, system=system, adapter=adapter)


class _Page:
    """What is on the page, and what happens on it. Each browser tab has its own conversation."""

    def __init__(self, dialogue: Dialogue, name: str, sampler: SamplerConfig) -> None:
        self.dialogue, self.name, self.own = dialogue, name, sampler
        self._stops: dict[str, threading.Event] = {}

    def build(self, *, seed: int, system: str | None, adapter: str | None) -> Any:
        """Lay the page out and bind its events."""
        import gradio as gr

        adapter = adapter or self.dialogue.adapters[0]
        with gr.Blocks(title=f"{self.name}: lmlab chat", analytics_enabled=False, fill_width=True) as page:
            gr.Markdown("## lmlab chat", elem_id="title")
            self.about = gr.Markdown(self._about(adapter), elem_id="about")
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=380):
                    self._conversation()
                with gr.Column(scale=2, min_width=380):
                    self._settings(seed, system, adapter)
            self._bind_answers()
            self._bind_settings(page)
        return page

    def _conversation(self) -> None:
        import gradio as gr

        small: dict[str, Any] = {"size": "sm", "min_width": 90}
        self.turns = gr.State([])
        self.chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            height="58vh",
            render_markdown=False,
            latex_delimiters=[],
            feedback_options=None,
            buttons=["copy_all"],
            placeholder="Write a message below.",
        )
        self.status = gr.Textbox(
            elem_id="status", show_label=False, interactive=False, container=False, lines=1, max_lines=3
        )
        with gr.Row(equal_height=True):
            self.message = gr.Textbox(
                elem_id="message",
                show_label=False,
                container=False,
                placeholder="Message: Enter sends",
                lines=1,
                max_lines=8,
                autofocus=True,
                scale=8,
            )
            self.send = gr.Button("Send", variant="primary", elem_id="send", min_width=90, scale=1)
        with gr.Row():
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, **small)
            self.again = gr.Button("Regenerate", elem_id="again", **small)
            self.clear = gr.Button("Clear", elem_id="clear", **small)

    def _settings(self, seed: int, system: str | None, adapter: str) -> None:
        import gradio as gr

        self.adapter = gr.Radio(
            list(self.dialogue.adapters), value=adapter, label="Answers come from", elem_id="adapter"
        )
        self.sampler = gr.Dropdown(
            sorted({*sampler_names(), self.own.kind}), value=self.own.kind, label="Sampler", elem_id="sampler"
        )
        with gr.Row():
            self.sliders = [
                gr.Slider(step=span[2], label=field, elem_id=field, min_width=170, **look)
                for (field, span), look in zip(SLIDERS.items(), self._looks(self.own.kind), strict=True)
            ]
        self.seed = gr.Number(
            value=seed, label="Seed of the next answer", precision=0, minimum=0, elem_id="seed"
        )
        self.system = gr.Textbox(
            value=system or "",
            label="System message",
            lines=2,
            visible=self.dialogue.memory(adapter) == "chat",
            elem_id="system",
        )

    def _bind_answers(self) -> None:
        import gradio as gr

        asked = [self.turns, self.adapter, self.sampler, self.seed, self.system, *self.sliders]
        buttons = [self.send, self.stop, self.again, self.clear]
        shown = [self.turns, self.chat, self.message, self.status, self.seed, *buttons]
        # One model: one answer at a time.
        busy: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "hidden",
            "api_visibility": "private",
        }

        def send(request: gr.Request, message: str, turns: list[Any], *rest: Any) -> Iterator[dict[Any, Any]]:
            if message.strip():
                asked = [*turns, {"role": "user", "content": message}]
                yield from self._answer(asked, turns, message, request, rest)
            else:
                yield {self.status: "write a message first"}

        def again(request: gr.Request, turns: list[Any], *rest: Any) -> Iterator[dict[Any, Any]]:
            if turns:
                yield from self._answer(turns[:-1], turns, "", request, rest)
            else:
                yield {self.status: "there is no answer yet"}

        # Gradio finds a request by its annotation, which it cannot look up inside this function.
        for function in (send, again):
            function.__annotations__["request"] = gr.Request
        sent = [self.message, *asked]
        gr.on([self.send.click, self.message.submit], send, sent, shown, **busy)
        self.again.click(again, asked, shown, **busy)

    def _bind_settings(self, page: Any) -> None:
        """What happens at once, whatever is being written."""
        import gradio as gr

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        def stop(request: gr.Request) -> None:
            if (event := self._stops.get(str(request.session_hash))) is not None:
                event.set()

        stop.__annotations__["request"] = gr.Request
        self.stop.click(stop, None, None, **quick)
        page.unload(stop)
        emptied = [self.turns, self.chat, self.message, self.status]
        # The second is the button that Gradio puts on the conversation.
        gr.on([self.clear.click, self.chat.clear], lambda: ([], [], "", ""), None, emptied, **quick)

        common = common_settings(self.own)

        def sliders(kind: str) -> list[Any]:
            # What every sampler has stays where it was moved to.
            looks = zip(SLIDERS, self._looks(kind), strict=True)
            return [gr.update() if field in common else gr.update(**look) for field, look in looks]

        def told(adapter: str) -> tuple[str, Any]:
            return self._about(adapter), gr.update(visible=self.dialogue.memory(adapter) == "chat")

        self.sampler.change(sliders, self.sampler, self.sliders, **quick)
        self.adapter.change(told, self.adapter, [self.about, self.system], **quick)

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _about(self, adapter: str) -> str:
        """The model's name as text, not as markup, and what of a conversation it is given."""
        source = self.dialogue.usable.source
        over = (
            f" over `{_code(Path(source).name if os.path.isdir(source) else source)}`"
            if self.dialogue.usable.adapter_names
            else ""
        )
        return f"`{_code(self.name)}`{over}. {MEMORY[self.dialogue.memory(adapter)]}"

    def _values(self, kind: str) -> dict[str, Any]:
        """A sampler's settings before any slider is moved."""
        own = kind == self.own.kind
        named = self.own if own else chosen_sampler({}, kind, common_settings(self.own))
        return named.model_dump()

    def _looks(self, kind: str) -> list[dict[str, Any]]:
        """How each slider looks for a sampler: hidden if it has no such setting."""
        values = self._values(kind)
        looks = []
        for field, (lowest, highest, _) in SLIDERS.items():
            value = OFF[field] if values.get(field, 0) is None else values.get(field, lowest)
            span = {"minimum": min(lowest, value), "maximum": max(highest, value)}
            looks.append({"visible": field in values, "value": value, **span})
        return looks

    def _chosen(self, kind: str, moved: tuple[Any, ...]) -> SamplerConfig:
        from lmlab.generation.samplers import samplers

        values, fields = self._values(kind), samplers.class_of(self._values(kind)["kind"]).model_fields
        changes: dict[str, Any] = {}
        for field, value in zip(SLIDERS, moved, strict=True):
            if field in values and value != values[field]:
                off = value == OFF.get(field) and type(None) in get_args(fields[field].annotation)
                changes[field] = None if off else type(SLIDERS[field][2])(value)
        return chosen_sampler(values, None, changes)

    # --- an answer ----------------------------------------------------------------------------------------------------

    def _answer(
        self, asked: list[Any], before: list[Any], message: str, request: Any, settings: tuple[Any, ...]
    ) -> Iterator[dict[Any, Any]]:
        """Picture after picture of the growing answer; an error leaves the conversation as it was ``before``, and the message."""
        import gradio as gr

        adapter, kind, seed, system, *moved = settings
        stop = self._stops[str(request.session_hash)] = threading.Event()
        running, idle = (
            {
                **{button: gr.update(interactive=not busy) for button in (self.send, self.again, self.clear)},
                self.stop: gr.update(interactive=busy),
            }
            for busy in (True, False)
        )
        yield {**running, self.chat: _drawn(asked), self.message: "", self.status: "writing ..."}
        text, drawn_at = "", 0.0
        try:
            check_seed(int(seed), where="seed")
            has_system = self.dialogue.memory(adapter) == "chat"
            for item in self.dialogue.stream(
                asked,
                stop=stop,
                sampler=self._chosen(kind, tuple(moved)),
                seed=int(seed),
                system=(system or None) if has_system else None,
                adapter=adapter,
            ):
                if isinstance(item, Reply):
                    turns = [*asked, {"role": "assistant", "content": item.text}]
                    yield {**idle, self.turns: turns, self.chat: _drawn(turns), self.seed: int(seed) + 1,
                           self.status: f"{adapter}, {kind}, seed {int(seed)}: {item.about}"}  # fmt: skip
                    return
                text += item
                if time.monotonic() - drawn_at > SHOW_EVERY:
                    drawn_at = time.monotonic()
                    yield {self.chat: _drawn([*asked, {"role": "assistant", "content": text}])}
        except Exception as error:  # also what nobody foresaw: the page must not be left with its buttons off
            known = isinstance(error, UserError | RunFailedError)
            told = str(error) if known else f"{type(error).__name__}: {error}"
            yield {**idle, self.chat: _drawn(before), self.message: message, self.status: f"error: {told}"}


def _drawn(turns: list[Any]) -> list[dict[str, str]]:
    """Turns for the eye: characters that nobody sees, or that reorder a line, made visible."""
    return [{"role": turn["role"], "content": visible(turn["content"])} for turn in turns]


def _code(text: str) -> str:
    """``text`` fit to stand between backticks."""
    return visible(text).replace("`", "'").replace("\n", " ")
