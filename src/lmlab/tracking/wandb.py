"""Weights & Biases as a mirror of the run's local files: one run per job, opened late, always finished.

Never a prompt, never a failed run and never a long wait: without a key it works offline from the first second; a service
that is away costs `init_timeout` at the start, or `finish_timeout` at the end if it goes away later; whatever the library
raises is said once and turns it off, because metrics.jsonl already has every number. Numbers go to the library's own
process, which sends them when it can; of a table the library asks its server first, which takes as long as the server
does, so tables have a thread. `wandb` is imported only when used.
"""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lmlab.records import OF_A_MULTIRUN, SAMPLE_FIGURES, Sample
from lmlab.registry import Config
from lmlab.tracking.data_view import DataView
from lmlab.tracking.errands import Errands
from lmlab.tracking.layer_plots import HeatMap, heat_maps, picture
from lmlab.tracking.values import writable

SAMPLE_COLUMNS = ("step", "prompt_id", "prompt", "sampler", "seed", "text", "new_tokens", "stop_reason",
                  *SAMPLE_FIGURES)  # fmt: skip
UTF8 = "utf-8"
EXAMPLE_COLUMNS = ("where", "tokens", "supervised_tokens", "truncated", "text")
OF_AN_AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""How `wandb agent` tells its child which run of which sweep it is."""


class LoggerConfig(Config):
    """Where the run is mirrored.

    Attributes:
        mode: ``auto`` is online if a key is there, else offline.
        group: runs compared with one another; a multirun sets its sweep's name.
        init_timeout: seconds that the start of a run waits for the service before it goes on offline.
        finish_timeout: seconds that the end of a run waits for what is not uploaded yet; it stays on disk.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    notes: str | None
    init_timeout: float = Field(gt=0)
    finish_timeout: float = Field(gt=0)


def has_key() -> bool:
    """Whether W&B could log in without asking: WANDB_API_KEY or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    file = os.environ.get("NETRC") or str(Path.home() / (".netrc" if os.name != "nt" else "_netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker:
    """One W&B run.

    Started by `wandb agent` it is the run that the agent has drawn; `run_id`, project and entity are then the agent's.

    Args:
        config: project, mode, group.
        run_dir: its ``wandb`` folder takes the files.
        run_id: kept in run.json, so that a resumed run goes on in its own W&B run.
        settings: the resolved, secret-free config of the run.
        tags: adapter, quantization, model.
        job_type: the task.
        say: prints a line to the user.

    Attributes:
        run_id: the id that was used in the end.
    """

    def __init__(
        self,
        config: LoggerConfig,
        *,
        run_dir: Path,
        run_id: str,
        settings: Mapping[str, Any],
        tags: Sequence[str],
        job_type: str,
        say: Callable[[str], None],
    ) -> None:
        if OF_A_MULTIRUN in os.environ:  # an agent asked for one run, so the jobs of a multirun are not it
            for name in OF_AN_AGENT:
                os.environ.pop(name, None)
        self._say, self._config, self.run_dir = say, config, run_dir
        self.run_id = (os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID")) or run_id
        self._run: Any = None
        self._rows: list[list[Any]] = []
        self._incomplete = False
        self._errands = Errands()
        self.mode = self._mode()
        if self.mode == "disabled":
            return
        about = {"settings": settings, "tags": [*tags, *config.tags], "job_type": job_type}
        if self.mode == "online":
            before = self._online_folders()
            try:
                self._open(**about)
                return
            except Exception as error:  # a server that is away, a key that is wrong: the run must not care
                say(f"W&B: cannot go online ({_first_line(error)}), so this run is recorded offline")
                self.mode = "offline"
                _end_service()
                for empty in self._online_folders() - before:
                    shutil.rmtree(empty, ignore_errors=True)
        self._guard(lambda: self._open(**about))

    def _online_folders(self) -> set[Path]:
        return set(self.run_dir.glob("wandb/run-*"))

    def _mode(self) -> str:
        """``auto`` decided: the library's own switch, which its users know, then whether there is a key."""
        wanted = os.environ.get("WANDB_MODE", "")
        if self._config.mode != "auto" or wanted == "disabled":
            return "disabled" if self._config.mode == "auto" else self._config.mode
        if has_key():
            return "offline" if wanted in ("offline", "dryrun") else "online"
        self._say(
            "W&B: no key found, so this run is recorded offline (set WANDB_API_KEY in .env to go online)"
        )
        return "offline"

    def _open(self, *, settings: Mapping[str, Any], tags: Sequence[str], job_type: str) -> None:
        # The library writes its own folders below the run, and its console lines are replaced by ours.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.run_dir / "wandb"))
        # The service process of a parent that uses W&B itself ends with that parent, and is not ours to end.
        os.environ.pop("WANDB_SERVICE", None)
        import wandb

        config = self._config
        with _without_slurm():
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                job_type=job_type,
                name=self.run_dir.name,
                notes=config.notes,
                id=self.run_id,
                resume="allow" if self.mode == "online" else None,
                dir=str(self.run_dir),
                config=dict(settings),
                tags=[tag[:64] for tag in tags],
                mode=self.mode,  # type: ignore[arg-type]
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True,
                    init_timeout=config.init_timeout,  # the library's own are 90 seconds, and for ever
                    finish_timeout=config.finish_timeout / 2,  # the other half is for the tables
                    finish_timeout_raises=True,
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_save_requirements=False,
                ),
            )
        wandb.termsetup(self._run.settings, _Listener(self._hear))
        self._beside_swept(settings)
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")

    def _beside_swept(self, settings: Mapping[str, Any]) -> None:
        """Put back what a sweep's own value hides: with ``adapter=lora`` W&B keeps "lora" alone under ``adapter``."""
        for group, values in settings.items():
            if isinstance(values, Mapping) and not isinstance(self._run.config.get(group), Mapping):
                self._run.config.update({f"{group}.{name}": value for name, value in values.items()})

    def _hear(self, text: str) -> None:
        """Of all the library has to say, that it gave up uploading: it goes on writing to disk."""
        self._incomplete = self._incomplete or "Fatal error while uploading" in text

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror one line of metrics."""
        run = self._run
        if run is not None:
            self._guard(lambda: run.log({"trainer/step": step, **values}))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Mirror new samples: a table with all rows so far, because W&B shows a logged table as it was."""
        if self._run is None or not samples:
            return
        self._rows += [[row.get(column) for column in SAMPLE_COLUMNS] for row in (s.row() for s in samples)]
        rows: list[Any] = list(self._rows)

        def table() -> dict[str, Any]:
            import wandb

            return {"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)}

        self._media(step, table)

    def data(self, report: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> None:
        """Mirror what the run is trained on, before its first step.

        The counts go to the summary as ``data/...``; into the history, at step 0, the lengths as a histogram, and the
        examples as a table and as a page with the trained spans coloured.

        Args:
            report: data_report.json's object.
            examples: mask_preview.json's list.
        """
        if self._run is None:
            return
        view = DataView.of(report, list(examples))
        self.summary({f"data/{name}": value for name, value in view.figures.items()})

        def lengths_and_examples() -> dict[str, Any]:
            import wandb

            from lmlab.tracking.report import mask_page

            made: dict[str, Any] = {}
            if view.lengths:
                histogram = (list(view.lengths.counts), list(view.lengths.edges))
                made["data/lengths"] = wandb.Histogram(np_histogram=histogram)  # type: ignore[arg-type]
            if view.examples:
                rows: list[Any] = [
                    [
                        writable(e.where, UTF8),
                        e.tokens,
                        e.supervised_tokens,
                        e.truncated,
                        writable(e.marked, UTF8),
                    ]
                    for e in view.examples
                ]
                made["data/examples"] = wandb.Table(columns=list(EXAMPLE_COLUMNS), data=rows)
                page = writable(mask_page(view.examples), UTF8)
                made["data/mask_preview"] = wandb.Html(page, inject=False, data_is_not_path=True)
            return made

        self._media(0, lengths_and_examples)

    def _media(self, step: int, make: Callable[[], dict[str, Any]]) -> None:
        """Log what ``make`` builds: at once if offline, else by the thread, as the library asks the server about tables."""
        run = self._run
        if run is None:
            return

        def log(*, ask: bool) -> None:
            import wandb

            made = make()
            for name, value in made.items():
                if isinstance(value, wandb.Table) and not ask:
                    value.bind_to_run(run, name, step)  # then it is a file of the run, no artifact
            run.log({"trainer/step": step, **made})

        if self.mode == "online":
            self._errands.add(lambda: log(ask=True), instead=lambda: self._guard(lambda: log(ask=False)))
        else:
            self._guard(lambda: log(ask=True))

    def layers(self) -> None:
        """Mirror layers.jsonl as heat maps, when the run is over."""
        if self._run is None:
            return
        pictures: list[tuple[HeatMap, bytes]] = []
        with contextlib.suppress(
            Exception
        ):  # a picture that cannot be drawn is no reason to end the mirroring
            from lmlab.tracking.report import read_layers

            pictures = [(found, picture(found)) for found in heat_maps(read_layers(self.run_dir))]

        def mirror() -> None:
            import wandb
            from PIL import Image

            for found, png in pictures:
                image = wandb.Image(Image.open(io.BytesIO(png)), caption=found.title)
                self._run.log({"trainer/step": found.steps[-1], f"layers/{found.name}_map": image})

        self._guard(mirror)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Mirror the final figures."""
        if self._run is not None:
            self._guard(lambda: self._run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """Close the run, as failed if ``exit_code`` is not 0, and say where it is."""
        if self.mode == "disabled":
            return
        self._errands.finish(self._config.finish_timeout / 2)
        if self._run is None or not self._close(exit_code):
            _end_service()  # left to the interpreter's exit, a broken one ends in a traceback

    def _close(self, exit_code: int) -> bool:
        run, self._run = self._run, None
        folder = Path(run.dir).parent
        url = run.url if self.mode == "online" else None

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                self._incomplete = True

        if not self._guard(finish):
            return False
        shown = os.path.relpath(folder)
        if reason := _no_room(folder):
            self._say(f"W&B: {shown} has not got everything ({reason}); every number is in metrics.jsonl")
        elif url and self._incomplete:
            sync = (
                f"wandb sync --include-online {shown}"  # without that it passes over a run that began online
            )
            self._say(f"W&B: {url} has not got everything: upload the rest with `{sync}`")
        elif url:
            self._say(f"W&B: {url}")
        else:
            self._say(f"W&B: look with `wandb leet run {shown}`, upload with `wandb sync {shown}`")
        return True

    def _guard(self, call: Callable[[], None]) -> bool:
        """Make a W&B call; the first exception is said in one line and ends the mirroring, never the run."""
        try:
            call()
        except Exception as error:  # any failure of a service must leave training untouched
            self._run = None
            self._say(f"W&B: stopped mirroring ({_first_line(error)}); every number is in metrics.jsonl")
            return False
        return True


class _Listener:
    """Takes what the library would print, were it not silent."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear

    def warning(self, msg: str) -> None:
        self._hear(msg)

    info = error = warning


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


@contextlib.contextmanager
def _without_slurm() -> Iterator[None]:
    """The library's process copies every SLURM_... that it was started with into the run's metadata, SLURM_JWT too."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _no_room(folder: Path) -> str | None:
    """Why nothing more can be written there; the library, which writes on, does not say."""
    probe = folder / ".room"
    try:
        probe.write_bytes(bytes(1 << 16))
        return None
    except OSError as error:
        return error.strerror
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _end_service() -> None:
    """End the library's own process, in which a run that was opened by half lives on under its id."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
