"""The table of optimizers: one ``OptimizerSpec`` a name. It knows no ranks and no layouts."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError, MissingPackageError, UnknownOptimizerError
from dist_optim.specs.driver import NamedDriver, UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope, check_hyperparameters, problem_of
from dist_optim.specs.verdict import Ghosts, Verdict

__all__ = [
    "OptimizerSpec",
    "Trait",
    "UpstreamClass",
    "get_spec",
    "names",
    "register",
    "spec_of_class",
    "spec_of_factory",
]

ENTRY_POINT_GROUP = "dist_optim.optimizers"


@dataclass(frozen=True, slots=True)
class UpstreamClass:
    """Loads ``name`` from ``module`` when called: the usual value of ``OptimizerSpec.load``."""

    module: str
    name: str

    def __call__(self) -> type[Optimizer]:
        optimizer_class: type[Optimizer] = getattr(importlib.import_module(self.module), self.name)
        return optimizer_class


class Trait(Enum):
    """What an optimizer needs or does. Code asks for traits, never for a class or a name."""

    ELEMENTWISE = "elementwise"
    """Any slice of a tensor may be stepped alone (outside the low-rank groups, where there are such)."""
    BLOCKWISE = "block-quantized"
    """State is quantized in blocks of the flattened tensor; rules on size hold for the whole tensor.

    Its driver may say of which tensors rows may be stepped alone (``runs_on_rows``).
    """
    WHOLE_TENSOR = "whole tensor"
    """Norms, SVDs or row and column means: the update of one element depends on all of the tensor."""
    LOW_RANK = "low-rank matrices"
    """Takes ``target_modules``; their matrices go into groups of their own with rank, gap and scale."""
    POSITION_DEPENDENT = "position-dependent"
    """The position of a parameter in the groups is part of the algorithm (seeds, decay by layer)."""
    WEIGHT_SWAPPING = "swaps weights for evaluation"
    """``train()`` and ``eval()`` exchange training and averaged weights."""
    STORAGE_REPLACING = "replaces parameter storage"
    """``step()`` rebinds ``parameter.data``."""
    COUPLED = "tensors depend on each other"
    """Tensors are stepped together by one rank: a norm or a step size over all of them, random draws, an order."""
    FUSED_BACKWARD = "steps inside backward"
    """The update happens while gradients are produced, one parameter at a time."""
    HIDDEN_MATRICES = "hidden matrices"
    """Made for the matrices inside a network: embeddings, output head and vectors go to ``OptimizerSpec.rest``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """Everything dist_optim knows of one optimizer.

    ``load`` imports the upstream class on first use, so that a spec costs nothing until it is built.
    """

    name: str
    load: Callable[[], type[Optimizer]]
    stands_for: tuple[UpstreamClass, ...] = ()
    """Classes of other packages that mean this optimizer when they are given in place of its name."""
    package: str
    """pip name of the upstream package."""
    extra: str = ""
    """The extra of dist-optim that installs it; empty when torch alone is enough."""
    traits: frozenset[Trait]
    hyperparameters: tuple[Hyperparameter, ...] | None = None
    """None takes the names and defaults of the class's constructor, unchecked."""
    matrix_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Other defaults for the groups of low-rank matrices, where the Trainer has such. What the user sets is for all."""
    embedding_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The same for the weights of ``torch.nn.Embedding``, which then get a group of their own."""
    driver: UpstreamDriver = field(default_factory=UpstreamDriver)
    paper: str = ""
    summary: str = ""
    licence: str = ""
    state_bytes: str = ""
    """State per parameter element, in words and bytes: for people who choose."""
    needs: tuple[str, ...] = ()
    """What it needs besides its package (``"CUDA"``, ``"a C++ compiler"``), and for what: for people who choose."""
    rest: str = ""
    """The name of what steps the tensors that this one is not made for, where the user names nothing."""
    instead: str = ""
    """For a name that is always stepped inside backward: the name of the same algorithm with stored gradients."""
    refusal: str = ""
    """Why building this optimizer is refused, and what to use; empty when it is served."""
    forced: Mapping[str, Any] = field(default_factory=dict)
    """Constructor keywords that are always passed (``fused=True`` of the fused variant)."""
    makes: type[Optimizer] | None = None
    """The class that is built, where a function that builds it was given in its place."""
    verdict: Verdict | None = None
    """What was shown of a class that nobody described; None before that, and in one process."""

    def load_class(self) -> type[Optimizer]:
        """The upstream class.

        Raises:
            MissingPackageError: The package is not installed; the message holds the ``pip install`` line.
        """
        try:
            return self.load()
        except ImportError as error:
            target = f"'dist-optim[{self.extra}]'" if self.extra else self.package
            raise MissingPackageError(
                f"optimizer {self.name!r} needs the package {self.package!r}, which cannot be imported here "
                f"({error}). Install it with: pip install {target}"
            ) from error

    def records(self) -> tuple[Hyperparameter, ...]:
        """The hyperparameters; read off the constructor where the spec does not list them."""
        return signature_records(self.load_class()) if self.hyperparameters is None else self.hyperparameters

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Checked values of all hyperparameters: the given ones, and the defaults of the rest.

        Raises:
            HyperparameterError: An unknown key, a wrong type, a value out of range, or a required one is missing.
        """
        records = self.records()
        checked = check_hyperparameters(self.name, records, given)
        missing = [record.name for record in records if record.required and record.name not in checked]
        if missing:
            raise HyperparameterError(f"{self.name} needs a value for {', '.join(missing)}: it has no default.")
        return {
            record.name: checked.get(record.name, record.default)
            for record in records
            if record.name in checked or not record.is_inherited
        }

    @property
    def is_undescribed(self) -> bool:
        """Nobody listed its hyperparameters or needs: it must prove at start-up that tensors can be stepped apart."""
        return self.hyperparameters is None

    @property
    def is_coupled(self) -> bool:
        """Its tensors depend on each other, or nobody has shown that they do not: one rank steps them all."""
        return Trait.COUPLED in self.traits or (self.verdict is not None and not self.verdict.is_independent)

    @property
    def keeps_tensors(self) -> bool:
        """Upstream's parameters keep their storage and their values between steps.

        A class that nobody described may read them in its constructor, keep them, or change those without a gradient.
        """
        return self.is_undescribed or Trait.COUPLED in self.traits

    def own_class(self) -> type[Optimizer]:
        """The class of what is built."""
        return self.makes or self.load_class()

    @property
    def packages(self) -> tuple[str, ...]:
        """The upstream packages whose versions all ranks must have alike."""
        return (self.package,)

    def in_scope(self, scope: Scope) -> tuple[str, ...]:
        """Names of the hyperparameters with this scope."""
        return tuple(record.name for record in self.records() if record.scope is scope)

    def values_in(self, group: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a group's tensors are stepped with: the constructor's arguments, over them the group's own values."""
        return {**arguments, **{key: value for key, value in group.items() if key != "params"}}

    def problem_in(
        self, groups: Sequence[Mapping[str, Any]], numbers: Sequence[int] | None = None
    ) -> HyperparameterError | None:
        """What is wrong with the values that param groups hold now; None if nothing. Local, and before a step.

        Args:
            groups: As the user sees them.
            numbers: Which groups they are, of those that the optimizer was built with; None for all.
        """
        return problem_of(self.name, lambda _: self.records(), groups)

    def with_arguments(self, arguments: Mapping[str, Any]) -> OptimizerSpec:
        """The spec for these constructor's arguments: without ``Trait.COUPLED`` where they couple no tensors."""
        if Trait.COUPLED not in self.traits or self.driver.couples(arguments):
            return self
        return replace(self, traits=self.traits - {Trait.COUPLED})

    def is_undescribed_in(self, group: Mapping[str, Any]) -> bool:
        """Whether nobody described what steps this group: it may write any value there, and what it writes is true."""
        return self.is_undescribed

    def ghosts_in(self, group: Mapping[str, Any]) -> Ghosts:
        """What stands in an instance for a tensor of this group that another one steps."""
        if self.verdict is not None:
            return self.verdict.ghosts
        return "with gradients" if self.driver.ghosts_have_gradients else "empty"


_signatures: dict[Any, tuple[Hyperparameter, ...]] = {}


def signature_records(optimizer_class: type[Optimizer]) -> tuple[Hyperparameter, ...]:
    """Records from a constructor's keywords, ``params`` left out; through the bases that its ``**keywords`` reach."""
    if optimizer_class not in _signatures:
        _signatures[optimizer_class] = _read_signatures(optimizer_class)
    return _signatures[optimizer_class]


def _read_signatures(optimizer_class: Any) -> tuple[Hyperparameter, ...]:
    found: dict[str, Hyperparameter] = {}
    if not isinstance(optimizer_class, type):  # a function
        parameters = list(inspect.signature(optimizer_class).parameters.values())
        named = [one for one in parameters[1:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        return tuple(_signature_record(one, optimizer_class, is_inherited=False) for one in named)
    for kind in takewhile(lambda kind: kind not in (Optimizer, object), optimizer_class.__mro__):
        if kind is not optimizer_class and "__init__" not in vars(kind):
            continue
        parameters = list(inspect.signature(kind).parameters.values())
        for parameter in parameters[1:]:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                record = _signature_record(parameter, kind, is_inherited=kind is not optimizer_class)
                found.setdefault(parameter.name, record)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return tuple(found.values())


def _signature_record(parameter: inspect.Parameter, kind: Any, is_inherited: bool) -> Hyperparameter:
    is_required = parameter.default is parameter.empty and not is_inherited
    return Hyperparameter(
        name=parameter.name,
        kind="any",
        default=None if parameter.default is parameter.empty else parameter.default,
        required=is_required,
        is_inherited=is_inherited,
        meaning=f"argument of {kind.__name__}",
    )


_specs: dict[str, OptimizerSpec] = {}
_package_drivers: dict[str, UpstreamDriver] = {}
_entry_points_read = False
_broken_plugins: list[str] = []
_lock = threading.RLock()


def register(spec: OptimizerSpec) -> None:
    """Add an optimizer under ``spec.name``.

    Registering an equal spec again does nothing.

    Raises:
        ValueError: Another spec already has this name, or the name is not an identifier.
    """
    if not spec.name.isidentifier():
        raise ValueError(f"{spec.name!r} is not a usable optimizer name. Use letters, digits and underscores.")
    with _lock:
        known = _specs.get(spec.name)
        if known is not None and known != spec:
            raise ValueError(
                f"An optimizer named {spec.name!r} is already registered (package {known.package!r}). "
                "Choose another name; registered optimizers are never replaced."
            )
        _specs[spec.name] = spec


def names() -> list[str]:
    """Every registered name, sorted; those of installed plug-in packages included."""
    _read_entry_points()
    return sorted(_specs)


def get_spec(name: str) -> OptimizerSpec:
    """The spec registered under ``name``.

    Raises:
        UnknownOptimizerError: With the nearest names.
    """
    _read_entry_points()
    if name in _specs:
        return _specs[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), list(_specs), n=3, cutoff=0.4)
    hint = f"The nearest names are: {', '.join(near)}. " if near else ""
    broken = f" Plug-ins that cannot be used: {'; '.join(_broken_plugins)}." if _broken_plugins else ""
    raise UnknownOptimizerError(f"There is no optimizer named {name!r}. {hint}All names: {', '.join(names())}.{broken}")


def register_package_driver(package: str, driver: UpstreamDriver) -> None:
    """Drive classes that come from ``package``, or inherit from one that does, and have no name, by ``driver``."""
    _package_drivers[package] = driver


def _driver_of(optimizer_class: type[Optimizer]) -> UpstreamDriver:
    packages = [kind.__module__.split(".")[0] for kind in optimizer_class.__mro__]
    for package in packages:
        if package in _package_drivers:
            return _package_drivers[package]
    return NamedDriver() if _first_argument(optimizer_class).startswith("named_") else UpstreamDriver()


def spec_of_class(optimizer_class: type[Optimizer]) -> OptimizerSpec:
    """A spec for a class given in place of a name.

    A class that a registered spec loads keeps that spec's traits, driver, checks and refusal, but has its own
    constructor's defaults. Any other class is taken to need whole tensors, which is right for every optimizer that is
    separable per tensor.
    """
    own = {record.name: record for record in signature_records(optimizer_class)}
    known = _find_spec(optimizer_class)
    if known is None:
        return OptimizerSpec(
            name=optimizer_class.__name__,
            load=lambda: optimizer_class,
            package=optimizer_class.__module__.split(".")[0],
            traits=_traits_of(optimizer_class),
            driver=_driver_of(optimizer_class),
        )
    records = tuple(
        replace(record, default=own[record.name].default, required=own[record.name].required)
        if record.name in own
        else record
        for record in known.records()
    )
    return replace(known, hyperparameters=records, matrix_defaults={}, embedding_defaults={})


def spec_of_factory(factory: Callable[..., Optimizer]) -> OptimizerSpec:
    """A spec for a function that takes parameters and returns an optimizer, a wrapper around another one, say.

    It is tried on one tiny parameter.

    Raises:
        HyperparameterError: It fails, or returns something else.
    """
    name = getattr(factory, "__name__", type(factory).__name__).strip("<>")
    try:
        made = factory([nn.Parameter(torch.zeros(2, 2, device="cpu"))])
    except Exception as error:
        raise HyperparameterError(
            f"{name} was given as a function that builds an optimizer, and fails on a list of parameters with "
            f"{type(error).__name__}: {error}. Pass a class, or a function of one argument: "
            "lambda params: Lookahead(torch.optim.AdamW(params, lr=1e-3))."
        ) from error
    if not isinstance(made, Optimizer):
        raise HyperparameterError(f"{name} returned a {type(made).__name__}, not a torch.optim.Optimizer.")
    kind: Any = factory
    return OptimizerSpec(
        name=name,
        load=lambda: kind,
        package=type(made).__module__.split(".")[0],
        traits=_traits_of(type(made)),
        makes=type(made),
    )


def _traits_of(optimizer_class: type[Optimizer]) -> frozenset[Trait]:
    swaps = callable(getattr(optimizer_class, "train", None)) and callable(getattr(optimizer_class, "eval", None))
    return frozenset({Trait.WHOLE_TENSOR} | ({Trait.WEIGHT_SWAPPING} if swaps else set()))


def _first_argument(optimizer_class: type[Optimizer]) -> str:
    return next(iter(inspect.signature(optimizer_class).parameters), "")


def _find_spec(optimizer_class: type[Optimizer]) -> OptimizerSpec | None:
    """The spec that loads exactly this class, if there is one; no other package is imported to find out."""
    _read_entry_points()
    for spec in sorted(_specs.values(), key=lambda spec: bool(spec.refusal)):
        if spec.forced or not isinstance(spec.load, UpstreamClass):
            continue
        for known in (spec.load, *spec.stands_for):
            if getattr(sys.modules.get(known.module), known.name, None) is optimizer_class:
                return spec
    return None


def _read_entry_points() -> None:
    """Register what installed packages offer under ``dist_optim.optimizers``: a spec, or a list of specs.

    One that fails, or whose name is taken, is left out with a warning.
    """
    global _entry_points_read
    with _lock:
        if _entry_points_read:
            return
        _entry_points_read = True
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                offered = entry_point.load()
                for spec in [offered] if isinstance(offered, OptimizerSpec) else offered:
                    register(spec)
            except Exception as error:  # somebody else's package: it must not take the other names with it
                why = f"{entry_point.name!r} ({entry_point.value}): {type(error).__name__}: {error}"
                _broken_plugins.append(why)
                warnings.warn(f"An optimizer plug-in cannot be used, all others can: {why}", stacklevel=2)
