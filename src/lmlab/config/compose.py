"""From a command line to a validated `RunConfig`: Hydra composes, pydantic decides, errors come out as one line.

Whatever is wrong with the configuration ends as a `UserError`: an unknown key or option (with "did you mean"), a
wrong type or range (with key, value and what is allowed), a secret in plain text. Nothing is written here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmlab.config.command_line import read_command_line
from lmlab.config.errors import UNKNOWN_KEY, combined, hydra_error, unknown_key, validation_problems
from lmlab.config.plaintext import refuse_secrets
from lmlab.config.shorthand import CONF, named_optimizer, own_sampler_by_name
from lmlab.journal import RunDir, beside
from lmlab.records import RunFailedError, UserError
from lmlab.registry import load_plugins

NO_EFFECT_ON_RESULT = (
    "run_name",
    "output_root",
    "resume",
    "overwrite",
    "logger",
    "launcher",
    "hparams_search",
)


def run_app(
    function: Callable[[Any, list[str]], int],
    *,
    config_name: str = "train",
    own: str = "",
    sweeps: bool = True,
) -> int:
    """Run ``function(composed config, overrides)`` under Hydra; the exit code.

    Hydra handles its own flags (--help, --cfg, --multirun, --config-dir, tab completion).

    Args:
        own: a key of the file that is no run's.
        sweeps: False where ``-m`` is refused, as the file's sweeper would train the combinations, whatever ``function`` does.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, so that they are formatted here
    load_env()
    composed: list[tuple[Any, list[str]]] = []

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def app(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        # Unresolved: an override may contain ${...}, and an error raised here gets headings from Hydra.
        told = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        composed.append((config, list(told)))  # type: ignore[arg-type]

    try:
        flags, sys.argv[1:] = read_command_line(sys.argv[1:])
        if not sweeps and (flags.multirun or "hydra.mode" in map(_key_of, flags.overrides)):
            raise UserError(
                "a sweep would train every combination", where="--multirun", fix="give one value for each key"
            )
        try:
            app()  # composes, or sweeps under --multirun, or prints help
        except (HydraException, OmegaConfBaseException) as error:
            if flags.multirun:
                raise hydra_error(error) from error
            raise _all_wrong(error, flags, config_name, own) from error
        # The work itself is done outside Hydra, which would wrap its errors in reports of its own.
        return function(*composed[0]) if composed else 0
    except UserError as error:
        return report_error(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except SystemExit as error:  # --help and --version
        return error.code if isinstance(error.code, int) else 0
    except BrokenPipeError:  # `--help | head`: whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return report_error(RunFailedError(f"{error.strerror} ({error.filename or 'disk'}): make room"))


def compose_config(overrides: Sequence[str] = ()) -> Any:
    """The `RunConfig` of ``python train.py OVERRIDES``, for Python code that has no command line.

    Raises:
        UserError: an override that does not compose, or a value that is not allowed.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("train", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_error(error) from error
    return to_run_config(composed)


def _all_wrong(error: BaseException, flags: Any, config_name: str, own: str) -> UserError:
    """What Hydra refused, together with everything else that is wrong on that command line.

    Hydra stops at its first error. So each refused override is forced in (an unknown key, which pydantic then
    describes knowing the chosen classes) or left out, until the rest composes and can be validated.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = str(Path(flags.config_dir).absolute()).replace("'", "\\'") if flags.config_dir else None
    search = [f"hydra.searchpath=['file://{folder}']"] if folder else []
    problems, remaining, forced = list[UserError](), list(flags.overrides), list[str]()
    while True:
        problem = hydra_error(error)
        guilty = next((o for o in remaining if _key_of(o) == problem.where), None)
        if guilty is None:
            return combined([*problems, problem])
        remaining.remove(guilty)
        if problem.what == UNKNOWN_KEY and "=" in guilty and not guilty.startswith(("~", "hydra")):
            forced.append("++" + guilty.lstrip("+"))
        else:
            problems.append(problem)
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                composed = compose(flags.config_name or config_name, [*search, *remaining, *forced])
        except (HydraException, OmegaConfBaseException) as next_error:
            error = next_error
            continue
        _, more = validate(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != own]))
        return combined([*problems, *more] or [_unknown_word(composed, _key_of(forced[0]))])


def _unknown_word(composed: Any, key: str) -> UserError:
    """A key of a free dictionary (model.config, data.columns) that the YAML does not have: mistyped, or new."""
    from omegaconf import OmegaConf

    group, _, last = key.rpartition(".")
    words = (OmegaConf.select(composed, group) if group else None) or {}
    error = unknown_key(key, [str(word) for word in words if word != last])
    return UserError(error.what, where=error.where, fix=f"{error.fix}; if it is meant, write +{key}=...")


def _key_of(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def report_error(error: UserError | RunFailedError) -> int:
    """Print ``error: what (where): what to do`` on stderr; the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def run_script(work: Callable[[], int], *, stopped: str = "stopped") -> int:
    """Read .env and do a script's ``work``; its exit code. An error is one line; Ctrl-C says ``stopped`` and gives 130."""
    load_env()
    try:
        return work()
    except (UserError, RunFailedError) as error:
        return report_error(error)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def load_env() -> None:
    """Read .env of the working directory (what is already set wins, nothing of it is ever logged); calm OpenMP.

    GNU's OpenMP, which torch uses on Linux, lets idle threads spin. With any other work on the same cores that costs a
    factor of 5 to 10 (measured on 2 cores: 550 tokens/s spinning, 3,900 with a short spin, beside one busy process); a
    very short spin costs tiny models a tenth when nothing else runs.
    It reads the variable once, when torch is first imported, so it is set here.
    """
    from dotenv import dotenv_values

    _use_utf8()
    for name, value in dotenv_values(Path.cwd() / ".env").items():
        if value:  # a line of .env.example left empty must not hide a default
            os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _use_utf8() -> None:
    """Begin anew in UTF-8 mode where the locale would have paths in ASCII (LC_ALL=C): no name beyond it could be opened."""
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and hasattr(sys, "orig_argv"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def to_run_config(composed: Any) -> Any:
    """Validate a composed Hydra config (or a plain dict read back from config.yaml).

    Returns:
        A frozen `RunConfig`.

    Raises:
        UserError: anything in it that is not allowed; all of it in one line.
    """
    config, problems = validate(composed)
    if problems:
        raise combined(problems)
    return config


def validate(composed: Any) -> tuple[Any, list[UserError]]:
    """(the `RunConfig`, nothing wrong) or (None, everything that is wrong).

    Raises:
        UserError: what must be mended before the rest can be looked at.
    """
    from pydantic import ValidationError

    from lmlab.config.schema import broken_rules, run_config_class

    values = {str(key): value for key, value in _plain(composed).items()}
    plugins = values.get("plugins")
    if isinstance(plugins, list) and all(isinstance(name, str) for name in plugins):
        load_plugins(plugins)
    refuse_secrets(values)
    values = own_sampler_by_name(named_optimizer(values))
    model = run_config_class()
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        return None, validation_problems(error, model)
    # Once more, by shape: a field may have read a file, as json_schema does.
    refuse_secrets(config.model_dump(mode="json"), by_key=False)
    problems = list(broken_rules(config))
    return (None if problems else config), problems


def _plain(composed: Any) -> dict[Any, Any]:
    """Interpolations resolved; a required value (``???``) left out, so that it counts as missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(composed):
        return dict(composed)
    # In a sweep Hydra's own node is still there, and some of its values exist only once Hydra starts a job.
    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    try:
        values: Any = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise hydra_error(error) from error
    return _without_missing(values)


def _without_missing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_missing(inner) for name, inner in value.items() if inner != "???"}
    return value


def fingerprint(config: Any) -> str:
    """Hash of every value that can change a result."""
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in NO_EFFECT_ON_RESULT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def dump_yaml(config: Any) -> str:
    """The frozen config as YAML that `load_frozen` reads back to the same object."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def freeze(run: RunDir, config: Any) -> None:
    """Write the run's config.yaml, by rename.

    Raises:
        UserError: the disk is full, or will not be written to.
    """
    temporary = beside(run.config, "tmp")
    try:
        temporary.write_text(dump_yaml(config), encoding="utf-8")
        temporary.replace(run.config)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"config.yaml cannot be written: {error.strerror}",
            where=str(run.path),
            fix="make room, or choose another output_root",
        ) from error


def load_frozen(path: Path) -> Any:
    """The `RunConfig` of a run directory's config.yaml.

    Raises:
        UserError: not there, or not a run's config.
    """
    return to_run_config(frozen_values(path))


def frozen_values(path: Path) -> dict[str, Any]:
    """What stands in a run directory's config.yaml; plugins are not imported and nothing is validated.

    Raises:
        UserError: not there, or not a run's config.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no readable config: {reason}", where=str(path), fix="give a run directory"
        ) from error
    if not isinstance(values, dict):
        raise UserError("not a run's config", where=str(path), fix="give a run directory")
    return values
