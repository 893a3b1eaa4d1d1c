"""The unions behind `kind:` in the config, and the plugins that add to them.

Every open group (adapter, data, sampler, ...) has one `Registry` of frozen pydantic config classes. A class
registers itself under the value of its discriminator (``kind: Literal["lora"]``); the run's config is validated
against the union of what is registered by then. A researcher's own package, named in ``plugins:`` or by the entry
point group ``lmlab.plugins``, adds classes by the same decorator: importing it is all that is needed.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field

from lmlab.records import UserError

PLUGIN_GROUP = "lmlab.plugins"


class Config(BaseModel):
    """Base of every config class: frozen, unknown keys refused, no silent type conversion.

    Values live in conf/*.yaml; a class carries types and ranges, and no defaults that a YAML also gives.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False
    )


C = TypeVar("C", bound=type[Config])


def _refuse_clash(name: str, known: Any, new: Any) -> None:
    """Two things under one name: the later would silently replace the earlier (a reload of the same one may)."""
    if known is not None and (known.__module__, known.__qualname__) != (new.__module__, new.__qualname__):
        both = " and ".join(f"{thing.__module__}.{thing.__qualname__}" for thing in (known, new))
        raise ValueError(f"{name} is registered twice, by {both}")


class Registry:
    """Config classes of one group by the value of their discriminator field.

    Args:
        group: the key in the run's config, for messages (``adapter``).
        discriminator: the field that tells the classes apart.
    """

    def __init__(self, group: str, discriminator: str = "kind") -> None:
        self.group, self.discriminator = group, discriminator
        self._classes: dict[str, type[Config]] = {}

    def register(self, cls: C) -> C:
        """Class decorator: add ``cls`` under each value its discriminator's Literal allows.

        Raises:
            TypeError: its discriminator is no Literal, so that nothing could ever choose it.
            ValueError: another class has that name.
        """
        field = cls.model_fields.get(self.discriminator)
        values = get_args(field.annotation) if field is not None else ()
        if not values or get_origin(field.annotation if field else None) is not Literal:
            raise TypeError(f'{cls.__qualname__} needs a field {self.discriminator}: Literal["its name"]')
        for value in values:
            _refuse_clash(f"{self.group}.{self.discriminator}={value}", self._classes.get(value), cls)
        self._classes.update(dict.fromkeys(values, cls))
        return cls

    def names(self) -> list[str]:
        """The values of the discriminator known so far, sorted."""
        return sorted(self._classes)

    def class_of(self, name: str) -> type[Config]:
        """The class registered under ``name``; KeyError if there is none."""
        return self._classes[name]

    def classes(self) -> tuple[type[Config], ...]:
        """Every registered class once, in the order of registration."""
        return tuple(dict.fromkeys(self._classes.values()))

    def is_union(self) -> bool:
        """Whether there is more than one class, so that pydantic needs the discriminator to choose."""
        return len(self.classes()) > 1

    def union(self) -> Any:
        """The discriminated union of everything registered, as a type pydantic can validate against."""
        classes = self.classes()
        if len(classes) == 1:
            return classes[0]
        return Annotated[Union[classes], Field(discriminator=self.discriminator)]  # noqa: UP007 - a runtime tuple


F = TypeVar("F", bound=Callable[..., Any])


class Functions(Generic[F]):
    """Named functions of one kind (formats, templates), open to plugins like the config classes."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._functions: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Function decorator: add under ``name``; ValueError if another function has it."""

        def add(function: F) -> F:
            _refuse_clash(f"{self.key}={name}", self._functions.get(name), function)
            self._functions[name] = function
            return function

        return add

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._functions)

    def get(self, name: str) -> F:
        """The function called ``name``.

        Raises:
            UserError: nothing of that name; the message lists what there is and the nearest.
        """
        if name not in self._functions:
            raise UserError(f"unknown {self.key} '{name}'", where=self.key, fix=suggest(name, self.names()))
        return self._functions[name]


adapters = Registry("adapter")
quants = Registry("quant")
data_sources = Registry("data")
tokenizers = Registry("tokenizer")
models = Registry("model")
samplers = Registry("sampler")
optimizers = Registry("optim", discriminator="name")
losses = Registry("loss")
callbacks = Registry("callbacks")
metrics = Registry("metrics")
hparams_searches = Registry("hparams_search")

BY_GROUP = {
    each.group: each
    for each in (
        adapters,
        quants,
        data_sources,
        tokenizers,
        models,
        samplers,
        optimizers,
        losses,
        callbacks,
        metrics,
        hparams_searches,
    )
} | {"samplers": samplers}
"""Registry by the key in the run's config; ``samplers`` are named ones of the same classes as ``sampler``."""

NAMED_GROUPS = ("samplers", "callbacks", "metrics")
"""Groups whose value is a dictionary of configs: ``samplers.NAME.kind``."""


def suggest(given: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?" where something is near, and always the list of what there is."""
    options = list(options)
    near = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    listed = "one of " + ", ".join(options) if options else "there is none"
    return (f"did you mean '{near[0]}'? " if near else "") + listed


def load_plugins(packages: Iterable[str]) -> None:
    """Import the named packages and every installed one of the entry point group ``lmlab.plugins``.

    Raises:
        UserError: one cannot be imported, or takes a name that is taken.
    """
    for entry in entry_points(group=PLUGIN_GROUP):
        _import(entry.value, entry.load)
    for package in packages:
        _import(package, lambda name=package: importlib.import_module(name))


def _import(name: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:  # it is somebody's code: whatever it raises is told in one line
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        raise UserError(
            f"plugin '{name}' cannot be imported: {type(error).__name__}: {error}",
            where="plugins",
            fix="install it or put its folder on PYTHONPATH"
            if missing
            else f'mend it; python -c "import {name}" shows where',
        ) from error
