"""The catalogue of methods: what each registry holds, read from docstrings and dataclass fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithms import ALGORITHMS, Algorithm
from ..allocations import ALLOCATIONS, Allocation
from ..config import PruningConfig
from ..config.distillation import DistillationOptions
from ..criteria import CRITERIA, Criterion
from ..patterns import PATTERNS, Pattern
from ..penalties import PENALTIES, Penalty
from ..plugins import load_installed_plugins
from ..registry import Registry, format_name, nearest
from ..schedulers import CURVES, SCHEDULERS, Curve, Scheduler
from ..solvers import SOLVERS, Solver
from ..training.distillation.hidden import relative_error
from ..training.distillation.terms import binary_cross_entropy, divergence, squared_error
from ..training.tuning import TUNINGS, Tuning


FAMILIES: tuple[tuple[Registry, type], ...] = (
    (ALGORITHMS, Algorithm),
    (PATTERNS, Pattern),
    (CRITERIA, Criterion),
    (ALLOCATIONS, Allocation),
    (SCHEDULERS, Scheduler),
    (CURVES, Curve),
    (SOLVERS, Solver),
    (PENALTIES, Penalty),
    (TUNINGS, Tuning),
)
"""Each registry with the contract of its members, whose docstring describes the family."""
LOSSES: tuple[Callable[..., Any], ...] = (divergence, binary_cross_entropy, squared_error, relative_error)
"""The terms of the loss of distillation, which the task and `DistillationOptions` select."""
LOSS_FAMILY = "loss"


@dataclass(frozen=True)
class MethodOption:
    """One option of a method.

    Args:
        name: of the dataclass field.
        type: as it is annotated.
        default: None also where there is none.
        required: whether there is no default.
        description: from `Args:` of the docstring.
    """

    name: str
    type: str
    default: Any
    required: bool
    description: str

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name}={self.default!r}"


@dataclass(frozen=True)
class MethodEntry:
    """One method of the catalogue.

    Args:
        name: what an option selects it by.
        summary: first paragraph of the docstring, without the formula that may follow.
        options: the fields of its dataclass.
        paper: `Reference:` of the docstring; "" without one.
        module: in which it is defined.
    """

    name: str
    summary: str
    options: tuple[MethodOption, ...]
    paper: str
    module: str


@dataclass(frozen=True)
class MethodFamily:
    """The methods that one option selects.

    Args:
        name: of the option, or "loss".
        summary: first paragraph of the docstring of their base class.
        methods: by name.
        options: those that all methods share.
    """

    name: str
    summary: str
    methods: tuple[MethodEntry, ...]
    options: tuple[MethodOption, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return dataclasses.asdict(self)


def read_catalogue(family: str | None = None) -> list[MethodFamily]:
    """Returns all registered methods, those of plug-ins that were loaded among them.

    Args:
        family: only the methods that this option selects, such as "criterion".

    Raises:
        ValueError: there is no such family, or a plug-in cannot be loaded.

    Example:
        >>> (criteria,) = read_catalogue("criterion")
        >>> [f"{method.name}: {method.summary}" for method in criteria.methods if method.name == "magnitude"]
        ['magnitude: |w|.']
    """
    load_installed_plugins()
    known = [*(registry.family for registry, _ in FAMILIES), LOSS_FAMILY]
    if family is not None and family not in known:
        raise ValueError(f"`family` is {format_name(family)}: known are {', '.join(known)}.{nearest(family, known)}")
    families = [
        MethodFamily(
            registry.family,
            _summary(_docstring(contract)),
            tuple(_entry(name, registry[name]) for name in registry.names()),
        )
        for registry, contract in FAMILIES
        if family in (None, registry.family)
    ]
    return families + [_losses()] * (family in (None, LOSS_FAMILY))


def _losses() -> MethodFamily:
    fields, defaults = dataclasses.fields(DistillationOptions), PruningConfig.defaults
    options = (
        MethodOption(field.name, str(field.type), defaults.get(field.name), False, field.metadata["help"])
        for field in fields
    )
    entries = tuple(_entry(function.__name__, function) for function in LOSSES)
    return MethodFamily(LOSS_FAMILY, _summary(_docstring(DistillationOptions)), entries, tuple(options))


def _entry(name: str, member: Any) -> MethodEntry:
    text = _docstring(member)
    paper = re.search(r"^Reference:\s+(.+?)(?:\n\n|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return MethodEntry(
        # A pattern is selected by its text form.
        name=getattr(member, "example", name),
        summary=_summary(text),
        options=tuple(_options(member, _all_descriptions(member))),
        paper=_one_line(paper[1]) if paper else "",
        module=member.__module__,
    )


def _docstring(member: Any) -> str:
    """Returns the docstring, "" where there is only the signature that `dataclass` puts in its place."""
    text = inspect.cleandoc(member.__doc__ or "")
    return "" if text.startswith(f"{member.__name__}(") else text


def _summary(text: str) -> str:
    return re.sub(r":$", ".", _one_line(text.split("\n\n")[0]))


def _descriptions(text: str) -> dict[str, str]:
    """Returns name -> text of the section `Args:`, in which several names can share a text."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, flags=re.MULTILINE)
    found = re.findall(
        r"^[ ]{4}(\w[\w, ]*): ((?:.*\n?)(?:[ ]{5,}.*\n?)*)", section[1] if section else "", re.MULTILINE
    )
    return {name: _one_line(words) for names, words in found for name in re.split(r",\s*", names)}


def _all_descriptions(member: Any) -> dict[str, str]:
    """Returns the descriptions of a class, and of the base classes from which it inherits options."""
    classes = reversed(inspect.getmro(member)) if inspect.isclass(member) else [member]
    return {name: words for each in classes for name, words in _descriptions(_docstring(each)).items()}


def _options(member: Any, descriptions: Mapping[str, str]) -> list[MethodOption]:
    options = []
    for field in dataclasses.fields(member) if dataclasses.is_dataclass(member) else ():
        if not field.init:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if required else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        options.append(MethodOption(field.name, kind, default, required, descriptions.get(field.name, "")))
    return options


def _one_line(text: str) -> str:
    return " ".join(text.split())
