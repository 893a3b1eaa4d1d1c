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
from typing import Annotated, Any, Generic, TypeVar, Union, get_args

from pydantic import BaseModel, ConfigDict, Field

from lmlab.records import UserError

PLUGIN_GROUP = "lmlab.plugins"


class Config(BaseModel):
    """Base of every config class: frozen, unknown keys refused, no silent type conversion.

    Values live in conf/*.yaml; a class carries types and ranges, and no defaults that a YAML also gives.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


C = TypeVar("C", bound=type[Config])


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
        """Class decorator: add ``cls`` under each value its discriminator's Literal allows."""
        for value in get_args(cls.model_fields[self.discriminator].annotation):
            known = self._classes.get(value)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"{self.group}.{self.discriminator}={value} is registered twice: {known}, {cls}"
                )
            self._classes[value] = cls
        return cls

    def names(self) -> list[str]:
        """The values of the discriminator known so far, sorted."""
        return sorted(self._classes)

    def class_of(self, name: str) -> type[Config]:
        """The class registered under ``name``; KeyError if there is none."""
        return self._classes[name]

    def union(self) -> Any:
        """The discriminated union of everything registered, as a type pydantic can validate against."""
        classes = tuple(dict.fromkeys(self._classes.values()))
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
        """Function decorator: add under ``name``."""

        def add(function: F) -> F:
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


def suggest(given: str, options: Iterable[str]) -> str:
    """ "did you mean 'x'?" where something is near, and always the list of what there is."""
    options = list(options)
    near = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    listed = "one of " + ", ".join(options) if options else "there is none"
    return (f"did you mean '{near[0]}'? " if near else "") + listed


def load_plugins(packages: Iterable[str]) -> None:
    """Import the named packages and every installed one of the entry point group ``lmlab.plugins``.

    Raises:
        UserError: a named package cannot be imported.
    """
    for entry in entry_points(group=PLUGIN_GROUP):
        entry.load()
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"plugin '{package}' cannot be imported: {error}",
                where="plugins",
                fix="install it or put it on PYTHONPATH",
            ) from error
