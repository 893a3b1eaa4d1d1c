"""Every way a configuration can be wrong, as a `UserError` with the key, the value and what is allowed.

Hydra's texts are recognised by their words (they carry no data), pydantic's reports by their types. What a key could
have meant is looked up in the registered config classes, so plugins' keys are known like lmlab's own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmlab import registry
from lmlab.records import RefusedError, UserError
from lmlab.registry import suggest

HELP = "python train.py --help lists all keys"
UNKNOWN_KEY = "unknown key"

_EVERYWHERE = {"kind", "name", "path", "config"}  # words of several groups, which point to none


def combined(problems: Sequence[UserError]) -> UserError:
    """All problems in one line: the first in full, the others by their key."""
    first = problems[0]
    others = list(dict.fromkeys(str(p.where) for p in problems[1:] if p.where != first.where))
    if not others:
        return first
    kind = RefusedError if all(isinstance(p, RefusedError) for p in problems) else UserError
    return kind(first.what, where=first.where, fix=f"{first.fix} (also wrong: {', '.join(others)})")


def hydra_error(error: BaseException) -> UserError:
    """What Hydra or OmegaConf refused, in lmlab's form."""
    text = str(error)

    def found(pattern: str) -> str | None:
        match = re.search(pattern, text)
        return match.group(1) if match else None

    if option := found(r"Could not find '([^']*)'"):
        group = found(r"Available options in '([^']+)'") or option.rpartition("/")[0]
        options = [o for o in re.findall(r"^\t([^\s=]+)$", text, re.MULTILINE) if not o.startswith("_")]
        name = option.removeprefix(group).strip("/")
        return UserError(f"no option '{name}'", where=group, fix=suggest(name, options))
    key = (
        found(r"Could not override '([^']+)'")
        or found(r"Could not delete from config\. '([^']+)'")
        or found(r"full_key: (\S+)")
        or found(r"Key '([^']+)' is not in struct")
    )
    if "Interpolation" in text or "interpolation" in text:
        return UserError(
            text.splitlines()[0], where=key, fix="write a value, or ${some.key} of this configuration"
        )
    if key:
        return unknown_key(key)
    if key := found(r"Multiple values for ([^\s.]+)\.") or found(r"An item is already at '([^']+)'"):
        return UserError("there is such a key already", where=key, fix="write it without the +")
    if override := found(r"Sweep parameters '(.+)' requires --multirun"):
        key = override.partition("=")[0]
        return UserError(f"'{override}' is many values", where=key, fix="add -m to run them, or write one")
    if override := found(r"Ambiguous value for argument '(.+)'"):
        key = override.partition("=")[0]
        return UserError(
            f"'{override}' is several values", where=key, fix="add -m to run each, or write [a,b] for a list"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return UserError(
        f"the configuration cannot be composed: {first}",
        where="command line",
        fix="settings are key=value or group=option; see python train.py --help",
    )


def known_keys() -> dict[str, list[str]]:
    """Dotted key -> the kinds of its group that have it; [] for a key that always stands."""
    from lmlab.config.schema import RunConfig

    keys: dict[str, list[str]] = {}
    for name, field in RunConfig.model_fields.items():
        keys[name] = []
        if name in registry.NAMED_GROUPS:
            continue
        if name in registry.BY_GROUP:
            classes = registry.BY_GROUP[name]
            for kind in classes.names():
                for inner in classes.class_of(kind).model_fields:
                    keys.setdefault(f"{name}.{inner}", []).append(kind)
        else:
            keys.update({f"{name}.{inner}": [] for inner in getattr(field.annotation, "model_fields", {})})
    return keys


def unknown_key(key: str, fields: Iterable[str] | None = None, kind: str = "") -> UserError:
    """An unknown key with what it could have meant.

    Args:
        fields: what stands at this place; by default what any option of the group has.
        kind: the option chosen in its group.
    """
    if key.startswith("hydra"):
        return UserError(UNKNOWN_KEY, where=key, fix="python train.py --cfg hydra shows Hydra's own")
    known = known_keys()
    group, _, last = key.rpartition(".")
    if fields is None:
        prefix = f"{group}." if group else ""
        fields = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
        fields = [k for k in fields if "." not in k]
    fields = list(fields)
    root = group.partition(".")[0]
    if root in registry.NAMED_GROUPS:
        classes = registry.BY_GROUP[root]
        owners = [k for k in classes.names() if last in classes.class_of(k).model_fields]
    else:
        owners = known.get(key, [])
    if owners and group:
        chosen = (
            f"{root}={kind}" if kind and root == group else f"kind {kind}" if kind else "the chosen option"
        )
        having = " or ".join(f"{root}={k}" if root == group else k for k in owners)
        return UserError(UNKNOWN_KEY, where=key, fix=f"{chosen} has no {last}; {having} has it")
    near = _near(key, last, group, fields, list(known))
    meant = f"did you mean '{near}'?" if near else ""
    listed = f"{group} has {', '.join(fields)}" if group and fields and not (near and len(fields) > 9) else ""
    return UserError(UNKNOWN_KEY, where=key, fix=" ".join(part for part in (meant, listed) if part) or HELP)


def _near(key: str, last: str, group: str, fields: list[str], known: list[str]) -> str | None:
    """The likeliest key: nearly the same word here, the same word elsewhere, a similar word here, then elsewhere."""
    prefix = f"{group}." if group else ""
    here = difflib.get_close_matches(last, fields, n=1, cutoff=0.6)
    if here and difflib.SequenceMatcher(None, last, here[0]).ratio() >= 0.8:
        return prefix + here[0]
    same = [k for k in known if k.rpartition(".")[2] == last and k != key]
    if same and last not in _EVERYWHERE:
        return max(same, key=lambda k: difflib.SequenceMatcher(None, key, k).ratio())
    if here:
        return prefix + here[0]
    others = [k for k in known if k != key and not key.startswith(f"{k}.")]
    if whole := difflib.get_close_matches(key, others, n=1, cutoff=0.7):
        return whole[0]
    words = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[2] not in _EVERYWHERE}
    word = difflib.get_close_matches(last, words, n=1, cutoff=0.8)
    return words[word[0]] if word else None


def validation_problems(error: Any, model: Any) -> list[UserError]:
    """pydantic's report, one `UserError` for each key; several types it could have had are joined by "or"."""
    problems: dict[str, UserError] = {}
    for entry in error.errors():
        problem = _problem(entry, model)
        same = problems.get(str(problem.where))
        if same is not None and same.fix != problem.fix:
            problem = UserError(same.what, where=same.where, fix=f"{same.fix} or {problem.fix}")
        problems[str(problem.where)] = problem
    return list(problems.values())


def _problem(entry: Mapping[str, Any], model: Any) -> UserError:
    path, tag = _without_tag(entry["loc"])
    key, given, context = ".".join(path), entry.get("input"), entry.get("ctx", {})
    if entry["type"] == "extra_forbidden":
        fields = _fields_at(path[:-1], tag, model)
        while isinstance(given, Mapping) and len(given) == 1 and not fields_are_free(fields, path):
            name, given = next(iter(given.items()))
            path.append(str(name))
        return unknown_key(".".join(path), fields if ".".join(path) == key else None, tag)
    if entry["type"] in ("missing", "union_tag_not_found"):
        discriminator = str(context.get("discriminator", "")).strip("'")
        key = ".".join(part for part in (key, discriminator) if part)
        return UserError("a value is missing", where=key, fix=f"add {key}=...")
    if entry["type"] == "union_tag_invalid":
        options = re.findall(r"'([^']*)'", str(context.get("expected_tags", "")))
        where = f"{key}.{str(context.get('discriminator', 'kind')).strip(chr(39))}"
        return _not_allowed(context.get("tag"), where, suggest(str(context.get("tag")), options))
    if entry["type"] == "literal_error":
        options = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return _not_allowed(given, key, suggest(str(given), options))
    allowed = re.sub(r"^(Input|List|String|Dictionary|Value) should ", "must ", entry["msg"])
    allowed = allowed.replace("a valid boolean", "true or false")
    if entry["type"] == "string_type" and isinstance(given, int | float):
        allowed += f""", so quote the number: {key}="'...'\""""
    allowed = re.sub(r"a valid dictionary or instance of \w+", "a group of keys", allowed)
    return _not_allowed(given, key, allowed.replace("Value error, ", ""))


def fields_are_free(fields: list[str], path: list[str]) -> bool:
    """Whether the unknown word stands inside a known group, where what is below it says nothing more."""
    return len(path) > 1 and bool(fields)


def _not_allowed(given: Any, where: str, fix: str) -> UserError:
    shown = repr(given)
    return UserError(
        f"{shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed", where=where, fix=fix
    )


def _without_tag(location: tuple[Any, ...]) -> tuple[list[str], str]:
    """pydantic's location without the union's tag it inserts after an open group's name, and that tag."""
    # Of a plain union (str | list[str]) pydantic appends the member's type, which is no key.
    path = [str(part) for part in location if not re.fullmatch(r"str|int|float|bool|.*\[.*\]", str(part))]
    place = 2 if path[0] in registry.NAMED_GROUPS else 1
    classes = registry.BY_GROUP.get(path[0])
    if classes is not None and len(path) > place and path[place] in classes.names() and classes.is_union():
        return path[:place] + path[place + 1 :], path[place]
    return path, ""


def _fields_at(path: list[str], tag: str, model: Any) -> list[str]:
    """Names of the fields the config class at this place has."""
    if not path:
        return list(model.model_fields)
    classes = registry.BY_GROUP.get(path[0])
    depth = 2 if path[0] in registry.NAMED_GROUPS else 1
    if classes is not None:
        cls: Any = classes.class_of(tag or classes.names()[0])
    else:
        cls = model.model_fields[path[0]].annotation
    for part in path[depth:]:
        cls = getattr(cls.model_fields.get(part), "annotation", None)
    return list(getattr(cls, "model_fields", {}))
