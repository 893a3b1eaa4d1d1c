"""Weights & Biases as a mirror of the run's local files: one run per job, opened late, always finished.

Never a prompt and never a failed run: without a key it works offline from the first second, and whatever the library
raises is said once and turns it off, because metrics.jsonl already has every number. `wandb` is imported only when used.
"""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lmlab.records import Sample
from lmlab.registry import Config
from lmlab.tracking.data_view import DataView
from lmlab.tracking.layer_plots import HeatMap, heat_maps, picture
from lmlab.tracking.values import writable

SAMPLE_COLUMNS = ("step", "prompt_id", "prompt", "sampler", "seed", "text", "new_tokens", "stop_reason")
UTF8 = "utf-8"
EXAMPLE_COLUMNS = ("where", "tokens", "supervised_tokens", "truncated", "text")


class LoggerConfig(Config):
    """Where the run is mirrored.

    Attributes:
        mode: ``auto`` is online if a key is there, else offline.
        group: runs compared with one another; a multirun sets its sweep's name.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    notes: str | None


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

    Args:
        config: project, mode, group.
        run_dir: its ``wandb`` folder takes the files.
        run_id: kept in run.json, so that a resumed run goes on in its own W&B run.
        settings: the resolved, secret-free config of the run.
        tags: adapter, quantization, model.
        job_type: the task.
        say: prints a line to the user.
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
        self._say, self.run_dir, self.run_id = say, run_dir, run_id
        self._run: Any = None
        self._rows: list[list[Any]] = []
        self.mode = config.mode
        if config.mode == "disabled":
            return
        if config.mode == "auto":
            wanted = os.environ.get("WANDB_MODE", "")  # the library's own switch, which its users know
            self.mode = "offline" if wanted in ("offline", "dryrun") or not has_key() else "online"
            if not has_key():
                say(
                    "W&B: no key found, so this run is recorded offline (set WANDB_API_KEY in .env to go online)"
                )
        try:
            self._open(config, settings, [*tags, *config.tags], job_type)
        except Exception as error:  # a server that is away, a key that is wrong: the run must not care
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            say(f"W&B: cannot go online ({detail}), so this run is recorded offline")
            self.mode = "offline"
            # The half-opened run still lives in the library's service under this id.
            self.run_id = secrets.token_hex(6)
            self._guard(lambda: self._open(config, settings, [*tags, *config.tags], job_type))

    def _open(
        self, config: LoggerConfig, settings: Mapping[str, Any], tags: list[str], job_type: str
    ) -> None:
        # The library writes its own folders below the run, and its console lines are replaced by ours.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.run_dir / "wandb"))
        import wandb

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
                init_timeout=20,  # 90 seconds by default: too long to wait for a server that is away
                console="off",
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("trainer/step")
        self._run.define_metric("*", step_metric="trainer/step")
        self._run.define_metric("val/loss", step_metric="trainer/step", summary="min")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Mirror one line of metrics."""
        if self._run is not None:
            self._guard(lambda: self._run.log({"trainer/step": step, **values}))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Mirror new samples: a table with all rows so far, because W&B shows a logged table as it was."""
        if self._run is None or not samples:
            return
        self._rows += [[getattr(sample, column) for column in SAMPLE_COLUMNS] for sample in samples]

        def table() -> None:
            import wandb

            self._run.log(
                {
                    "trainer/step": step,
                    "samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=list(self._rows)),
                }
            )

        self._guard(table)

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

        def mirror() -> None:
            import wandb

            from lmlab.tracking.report import mask_page

            self._run.summary.update({f"data/{name}": value for name, value in view.figures.items()})
            logged: dict[str, Any] = {"trainer/step": 0}
            if view.lengths:
                histogram = (list(view.lengths.counts), list(view.lengths.edges))
                logged["data/lengths"] = wandb.Histogram(np_histogram=histogram)  # type: ignore[arg-type]
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
                logged["data/examples"] = wandb.Table(columns=list(EXAMPLE_COLUMNS), data=rows)
                page = writable(mask_page(view.examples), UTF8)
                logged["data/mask_preview"] = wandb.Html(page, inject=False, data_is_not_path=True)
            self._run.log(logged)

        self._guard(mirror)

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
        if self._run is None:
            return
        run, self._run = self._run, None
        folder = Path(run.dir).parent
        url = run.url if self.mode == "online" else None
        self._guard(lambda: run.finish(exit_code=exit_code))
        if url:
            self._say(f"W&B: {url}")
        else:
            shown = os.path.relpath(folder)
            self._say(f"W&B: look with `wandb leet run {shown}`, upload with `wandb sync {shown}`")

    def _guard(self, call: Callable[[], None]) -> None:
        """Run a W&B call; the first exception is said in one line and ends the mirroring, never the run."""
        try:
            call()
        except Exception as error:  # any failure of a service must leave training untouched
            self._run = None
            detail = str(error).strip().splitlines()
            reason = detail[0][:160] if detail else type(error).__name__
            self._say(f"W&B: stopped mirroring ({reason}); every number is in metrics.jsonl")
            print(f"warning: W&B stopped: {reason}", file=sys.stderr)
