"""From a command line to a validated `RunConfig`: Hydra composes, pydantic decides, errors come out as one line.

Whatever is wrong with the configuration ends as a `UserError`: an unknown key or option (with "did you mean"), a
wrong type or range (with key, value and what is allowed), a secret in plain text. Nothing is written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmlab.records import UserError
from lmlab.registry import load_plugins, suggest

CONF = Path(__file__).resolve().parents[3] / "conf"
NO_EFFECT_ON_RESULT = ("run_name", "output_root", "resume", "overwrite", "logger", "launcher")

_SECRET_WORDS = {"key", "token", "secret", "password"}
_KNOWN_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_]{16,}|ghp_[A-Za-z0-9]{16,})"
)


def run_app(function: Callable[[Any, list[str]], int], *, config_name: str = "train") -> int:
    """Run ``function(composed config, overrides)`` under Hydra; the exit code.

    Hydra handles its own flags (--help, --cfg, --multirun, --config-dir, tab completion).
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, so that they are formatted here
    load_env()
    composed: list[tuple[Any, list[str]]] = []

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def app(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        composed.append((config, list(HydraConfig.get().overrides.task)))

    try:
        app()  # composes, or sweeps under --multirun, or prints help
        # The work itself is done outside Hydra, which would wrap its errors in reports of its own.
        return function(*composed[0]) if composed else 0
    except (HydraException, OmegaConfBaseException) as error:
        return report_error(hydra_error(error))
    except UserError as error:
        return report_error(error)
    except SystemExit as error:  # --help and argparse errors
        return error.code if isinstance(error.code, int) else 0


def report_error(error: UserError) -> int:
    """Print ``error: what (where): what to do`` on stderr; the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def load_env() -> None:
    """Read .env of the working directory (what is already set wins, nothing of it is ever logged); calm OpenMP.

    GNU's OpenMP, which torch uses on Linux, lets idle threads spin. With any other work on the same cores that costs a
    factor of 5 to 10 (measured on 2 cores: 550 tokens/s spinning, 3,900 with a short spin, beside one busy process).
    It reads the variable once, when torch is first imported, so it is set here.
    """
    from dotenv import dotenv_values

    for name, value in dotenv_values(Path.cwd() / ".env").items():
        if value:  # a line of .env.example left empty must not hide a default
            os.environ.setdefault(name, value)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def to_run_config(composed: Any) -> Any:
    """Validate a composed Hydra config (or a plain dict read back from config.yaml).

    Returns:
        A frozen `RunConfig`.

    Raises:
        UserError: anything in it that is not allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if OmegaConf.is_config(composed):
        try:
            own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
            values = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            key = str(error).split(":")[-1].splitlines()[0].strip()
            raise UserError(f"{key} is required", where=key, fix=f"add {key}=...") from error
        except OmegaConfBaseException as error:
            raise UserError(
                f"the configuration cannot be resolved: {str(error).splitlines()[0]}",
                fix="mend the interpolation",
            ) from error
    else:
        values = composed
    assert isinstance(values, dict)
    values = {str(key): value for key, value in values.items() if key != "hydra"}
    load_plugins(values.get("plugins") or [])
    refuse_secrets(values)
    from pydantic import ValidationError

    from lmlab.config.schema import check_rules, run_config_class

    model = run_config_class()
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        raise _validation_error(error, model) from error
    check_rules(config)
    for name in config.samples.grid:
        if name not in config.samplers:
            raise UserError(
                f"unknown sampler '{name}'", where="samples.grid", fix=suggest(name, config.samplers)
            )
    return config


def fingerprint(config: Any) -> str:
    """Hash of every value that can change a result."""
    values = {k: v for k, v in config.model_dump(mode="json").items() if k not in NO_EFFECT_ON_RESULT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def known_keys() -> list[str]:
    """Every dotted key that stands in conf/, for suggestions."""
    from omegaconf import OmegaConf

    keys: set[str] = set()
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        top = (
            group in (".", "task", "experiment", "debug")
            or "_global_" in file.read_text(encoding="utf-8")[:40]
        )
        prefix = "" if top else group.replace("/", ".")
        if isinstance(content, dict):
            keys.update(_flatten(content, prefix))
    return sorted(k for k in keys if not k.startswith(("defaults", "hydra")))


def _flatten(values: Mapping[Any, Any], prefix: str) -> list[str]:
    keys = []
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        keys.append(key)
        if isinstance(value, Mapping):
            keys += _flatten(value, key)
    return keys


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(p.name for p in CONF.iterdir() if p.is_dir())


def hydra_error(error: BaseException) -> UserError:
    """A Hydra or OmegaConf error as one line with a suggestion."""
    text = str(error)
    match = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if match:
        key = match.group(1)
        full = re.search(r"full_key: (\S+)", text)
        return _unknown_key(full.group(1) if full else key)
    match = re.search(r"Could not find '([^']+)/([^'/]+)'", text)
    if match:
        group, option = match.groups()
        options = sorted(p.stem for p in (CONF / group).glob("[!_]*.yaml")) or re.findall(
            r"^\t(\S+)$", text, re.MULTILINE
        )
        return UserError(
            f"no option '{option}' in group '{group}'",
            where=f"{group}={option}",
            fix=suggest(option, options),
        )
    match = re.search(r"Could not override '?([\w/@.]+)'?\.\s*\n?No match in the defaults list", text)
    if match:
        return _unknown_key(match.group(1))
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"the command line cannot be read: {first}",
        fix="options are key=value or group=option; see python train.py --help",
    )


def _unknown_key(key: str) -> UserError:
    import difflib

    near = difflib.get_close_matches(key, [*known_keys(), *groups()], n=1, cutoff=0.6)
    if not near and "." in key:  # right group, or the right last word in another group
        last = key.rsplit(".", 1)[1]
        near = [k for k in known_keys() if k.endswith(f".{last}")][:1]
    fix = f"did you mean '{near[0]}'?" if near else "python train.py --help lists all keys"
    return UserError(f"unknown key '{key}'", where=key, fix=fix)


def _validation_error(error: Any, model: Any) -> UserError:
    """pydantic's report as one line: the first problem in full, the other keys by name."""
    problems = [_problem(entry, model) for entry in error.errors()]
    first = problems[0]
    others = list(dict.fromkeys(str(p.where) for p in problems[1:] if p.where != first.where))
    if others:
        return UserError(first.what, where=first.where, fix=f"{first.fix} (also wrong: {', '.join(others)})")
    return first


def _problem(entry: Mapping[str, Any], model: Any) -> UserError:
    from lmlab.config.schema import RunConfig

    path = _without_tags(entry["loc"])
    key = ".".join(path)
    given, kind, context = entry.get("input"), entry["type"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        fields = _fields_at(path[:-1], entry["loc"], model)
        near = suggest(path[-1], fields) if fields else "python train.py --help lists all keys"
        if not path[:-1]:
            near = suggest(path[-1], RunConfig.model_fields)
        return UserError(f"unknown key '{key}'", where=key, fix=near)
    if kind == "missing":
        return UserError(f"{key} is missing", where=key, fix=f"add {key}=...")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        discriminator = context.get("discriminator", "'kind'").strip("'")
        options = [
            option.strip(" '")
            for option in str(context.get("expected_tags", "")).split(",")
            if option.strip()
        ]
        tag = str(context.get("tag", ""))
        where = f"{key}.{discriminator}" if key else discriminator
        return UserError(f"unknown {where} '{tag}'", where=where, fix=suggest(tag, options))
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return UserError(f"{key}={given!r} is not allowed", where=key, fix=suggest(str(given), options))
    allowed = entry["msg"].replace("Input should be ", "must be ").replace("Value error, ", "")
    return UserError(f"{key}={given!r} is not allowed", where=key, fix=allowed)


def _without_tags(location: tuple[Any, ...]) -> list[str]:
    """pydantic's location without the union tags it inserts after the name of an open group."""
    from lmlab.config.schema import RunConfig

    tagged = ("model", "data", "tokenizer", "adapter", "quant", "optim", "loss", "sampler")
    path = [str(part) for part in location]
    if (
        path
        and path[0] in tagged
        and path[0] in RunConfig.model_fields
        and len(path) > 1
        and _is_tag(path[0], path[1])
    ):
        return [path[0], *path[2:]]
    if (
        path
        and path[0] in ("callbacks", "metrics", "samplers")
        and len(path) > 2
        and _is_tag(path[0], path[2])
    ):
        return [*path[:2], *path[3:]]
    return path


def _registry_of(group: str) -> Any:
    from lmlab import registry

    names = {
        "data": "data_sources",
        "model": "models",
        "quant": "quants",
        "optim": "optimizers",
        "loss": "losses",
    }
    plural = {"tokenizer": "tokenizers", "adapter": "adapters", "sampler": "samplers"}
    return getattr(registry, {**names, **plural}.get(group, group))


def _is_tag(group: str, part: str) -> bool:
    return part in _registry_of(group).names()


def _fields_at(path: list[str], location: tuple[Any, ...], model: Any) -> list[str]:
    """Names of the fields the config class at this place has."""
    if not path:
        return list(model.model_fields)
    tags = [str(part) for part in location]
    try:
        if path[0] in ("callbacks", "metrics", "samplers") or _is_tag(path[0], tags[1]):
            registry = _registry_of(path[0])
            tag = next(part for part in tags[1:] if part in registry.names())
            return list(registry.class_of(tag).model_fields)
    except (AttributeError, StopIteration, IndexError):
        pass
    annotation = model.model_fields[path[0]].annotation
    return list(getattr(annotation, "model_fields", {}))


def refuse_secrets(values: Any, path: str = "") -> None:
    """Refuse a literal secret: config.yaml, W&B and checkpoints would all carry it.

    A value is one if it has the shape of a known token, or stands under a key one of whose words is key, token,
    secret or password and is not empty.

    Raises:
        UserError: names the key, never the value.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            refuse_secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            refuse_secrets(value, f"{path}[{index}]")
    elif isinstance(values, str) and values:
        words = set(re.split(r"[^a-z]+", path.rsplit(".", 1)[-1].lower()))
        if _KNOWN_SECRETS.search(values) or words & _SECRET_WORDS:
            raise UserError(
                "a secret in the configuration",
                where=path,
                fix="put it in .env (see .env.example) and leave it out of the command line",
            )


def dump_yaml(config: Any) -> str:
    """The frozen config as YAML that `load_frozen` reads back to the same object."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_frozen(path: Path) -> Any:
    """The `RunConfig` of a run directory's config.yaml.

    Raises:
        UserError: not there, or not a run's config.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"no readable config: {error}", where=str(path), fix="give a run directory"
        ) from error
    if not isinstance(values, dict):
        raise UserError("not a run's config", where=str(path), fix="give a run directory")
    return to_run_config(values)
