"""DeepSpeed: dist_optim's names in the JSON, under ZeRO 0, 1, 2 and 3.

After ``register()``, stock ``deepspeed.initialize`` (and whoever calls it: accelerate, the Hugging Face Trainer)
resolves every registered name::

    {"optimizer": {"type": "galore_adamw", "params": {"lr": 1e-3, "rank": 64, "target_modules": "all-linear"}}}

``params`` are the keywords of ``dist_optim.build_optimizer``: hyperparameters, ``target_modules``, ``no_decay``. Names
that DeepSpeed has itself (``adagrad``, ``muon``) stay its own; ``dist_optim.adagrad`` is ours.

``register`` extends three methods of ``DeepSpeedEngine``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_optim.building.alike import assert_alike
from dist_optim.building.arguments import check_settings
from dist_optim.building.choice import resolve
from dist_optim.building.composing import Rest, compose
from dist_optim.building.stacks import coverage, coverage_line, refuse_low_coverage
from dist_optim.errors import (
    DistOptimError,
    HyperparameterError,
    MissingPackageError,
    UnknownOptimizerError,
    UnsupportedError,
)
from dist_optim.integrations.deepspeed.limits import refuse_unserved
from dist_optim.integrations.deepspeed.optimizer import GROUP_NUMBER, ZeroOptimizer
from dist_optim.integrations.deepspeed.schedules import register_schedules
from dist_optim.layouts.detect import PlacedParameter, named_parameters
from dist_optim.layouts.detect_zero import logical_shape
from dist_optim.layouts.layout import Replicated
from dist_optim.overrides import check
from dist_optim.ranks.agreement import own_rank
from dist_optim.ranks.liveness import watch_ranks
from dist_optim.ranks.together import raise_together, together
from dist_optim.specs.registry import OptimizerSpec, Trait, get_spec, names
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = [
    "PREFIX",
    "UnknownDeepSpeedOptimizerError",
    "build_optimizer_for_engine",
    "is_ours",
    "refuse_options",
    "register",
]

PREFIX = "dist_optim."


class UnknownDeepSpeedOptimizerError(UnknownOptimizerError, AssertionError):
    """Neither DeepSpeed nor dist_optim knows the name; an AssertionError, as DeepSpeed's own is."""


def register() -> None:
    """Make every name of ``dist_optim.names()`` resolve in the JSON, and schedules' names in its ``scheduler`` section.

    Calling it again does nothing.

    Raises:
        MissingPackageError: deepspeed is not installed.
        UnsupportedError: This version of deepspeed has other methods than the ones extended here.
    """
    engine_class, supported = _deepspeed_parts()
    if ZeroOptimizer in supported:
        return
    check("deepspeed")
    for method, extend in (
        ("_is_supported_optimizer", _extend_support),
        ("_configure_basic_optimizer", _extend_construction),
        ("_configure_optimizer", _extend_configuration),
    ):
        setattr(engine_class, method, extend(getattr(engine_class, method)))
    supported.append(ZeroOptimizer)
    register_schedules()


def _deepspeed_parts() -> tuple[Any, list[type]]:
    try:
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    except ImportError as error:
        raise MissingPackageError(
            f"dist_optim.integrations.deepspeed needs deepspeed ({error}). Install it with: "
            "pip install 'dist-optim[deepspeed]'"
        ) from error
    return DeepSpeedEngine, ZERO_SUPPORTED_OPTIMIZERS


def _extend_support(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def _is_supported_optimizer(self: Any, optimizer_name: str) -> bool:
        if is_ours(optimizer_name) or original(self, optimizer_name):
            return True
        try:
            get_spec(optimizer_name.removeprefix(PREFIX))
        except UnknownOptimizerError as error:
            raise UnknownDeepSpeedOptimizerError(
                f"{optimizer_name} is not a supported DeepSpeed Optimizer. {error}"
            ) from None
        return False

    return _is_supported_optimizer


def _extend_construction(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        name = self.optimizer_name()
        if not is_ours(name):
            return original(self, model_parameters)

        params = self.optimizer_params() or {}

        def build() -> ZeroOptimizer:
            refuse_unserved(self)
            return _build(self.module, str(name), model_parameters, params)

        built = together(build, doing="Building the optimizer of DeepSpeed's configuration")
        assert_alike({"optimizer": name, **params}, None, built.spec.packages)
        return built

    return _configure_basic_optimizer


def _extend_configuration(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        raise_together(_why_no_client(client_optimizer))
        original(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, ZeroOptimizer):
            _attach(self, self.basic_optimizer)

    return _configure_optimizer


def _why_no_client(client: Any) -> DistOptimError | None:
    """Why this client optimizer would not train what the user asked for; None where nothing is known against it."""
    if isinstance(client, DistributedOptimizer):
        return UnsupportedError(
            f"{client.spec.name}: dist_optim.build_optimizer was given the plain model, whose parameters DeepSpeed "
            "flattens. Use dist_optim.integrations.accelerate.prepare, or name the optimizer in DeepSpeed's JSON."
        )
    groups = getattr(client, "param_groups", [])
    if not isinstance(client, ZeroOptimizer) and any(GROUP_NUMBER in group for group in groups):
        return UnsupportedError(
            f"{type(client).__name__} was put in the place of the optimizer that was asked for, on its param groups "
            "(accelerate does so where the optimizer is offloaded to the CPU). Set "
            '"zero_force_ds_cpu_optimizer": false in DeepSpeed\'s configuration, or use '
            "dist_optim.integrations.accelerate.prepare."
        )
    return None


def is_ours(name: str | None) -> bool:
    """Whether DeepSpeed's configuration means one of our optimizers by this name."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    if name is None or name in DEEPSPEED_OPTIMIZERS:
        return False
    return name.removeprefix(PREFIX) in names()


def build_optimizer_for_engine(
    model: nn.Module,
    optimizer: str | type[Optimizer],
    *,
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    target_modules: str | Sequence[str] | None = None,
    no_decay: Iterable[str] = (),
    rest: str | type[Optimizer] | None = None,
    rest_options: Mapping[str, Any] | None = None,
    print_audit: bool = True,
    rank_timeout_s: float | None = None,
    fused_backward: bool | None = None,
    reduce_to_owner: bool = False,
    on_nonfinite: str | None = None,
    independent: bool | None = None,
    master_weights: bool = False,
    verify_steps: int = 0,
    min_coverage: float | None = None,
    **hyperparameters: Any,
) -> ZeroOptimizer:
    """The optimizer over the model before DeepSpeed flattens it: a client optimizer for ``deepspeed.initialize``.

    Args:
        model: The user's module, possibly made under ``zero.Init``.
        optimizer: A registered name or an optimizer class.
        params: What DeepSpeed would give to an optimizer: parameters, groups, or None for all of the model's.
        target_modules: As in ``dist_optim.build_optimizer``; as are ``no_decay``, ``rest``, ``rest_options``,
            ``print_audit``, ``rank_timeout_s``, ``independent``, ``min_coverage``, hyperparameters.
        fused_backward: True is refused: DeepSpeed's engine steps when backward is done.
        reduce_to_owner: True is refused: DeepSpeed's engine reduces gradients, to its partitions.
        on_nonfinite: Refused: DeepSpeed's engine looks for such gradients itself.
        master_weights: Refused: DeepSpeed's engine has masters.
        verify_steps: As in ``dist_optim.build_optimizer``; of fp32 masters, where the engine has such.

    Raises:
        DistOptimError: As ``dist_optim.build_optimizer``, on this rank alone.
    """
    check_settings(bucket_bytes=1, check_ranks_every=0, verify_steps=verify_steps, min_coverage=min_coverage)
    spec = named = resolve(optimizer)
    refuse_options(
        spec,
        master_weights=master_weights,
        fused_backward=fused_backward,
        reduce_to_owner=reduce_to_owner,
        on_nonfinite=on_nonfinite,
    )
    placed = {
        fqn: PlacedParameter(
            fqn, parameter, logical_shape(parameter), Replicated(), None, position, parameter.requires_grad
        )
        for position, (fqn, parameter) in enumerate(named_parameters(model))
    }
    chosen: Any = None if params is None else list(params)
    trainable = {id(one.parameter) for one in placed.values() if one.parameter.requires_grad}
    if chosen is not None and {id(one) for one in chosen} == trainable:
        chosen = None  # a plain list of all that is trained: frozen parameters keep their positions, as in one process
    spec, groups, arguments = compose(
        model,
        spec,
        placed,
        hyperparameters,
        params=chosen,
        no_decay=no_decay,
        target_modules=target_modules,
        rest=Rest(rest, rest_options or {}),
        takes_idle=False,
        splits_stacks=True,
    )
    share = coverage(named, spec, groups)
    refuse_low_coverage(named.name, share, min_coverage)
    built = ZeroOptimizer(
        spec,
        groups,
        arguments,
        print_audit=print_audit,
        rank_timeout_s=rank_timeout_s,
        independent=independent,
        verify_steps=verify_steps,
    )
    built.coverage = coverage_line(named.name, share)
    return built


def refuse_options(
    spec: OptimizerSpec,
    *,
    master_weights: Any = False,
    fused_backward: Any = None,
    reduce_to_owner: Any = False,
    on_nonfinite: Any = None,
) -> None:
    """Refuse options of ``build_optimizer`` that DeepSpeed's engine does itself, or cannot do.

    Raises:
        UnsupportedError: With what to do; of the first one.
    """
    if master_weights:
        raise UnsupportedError(
            f'{spec.name}: DeepSpeed keeps fp32 masters itself, with "bf16" or "fp16" in its configuration, and '
            "upstream steps those. Leave master_weights out."
        )
    if fused_backward:
        raise UnsupportedError(
            f"{spec.name}: fused_backward=True updates inside backward, and DeepSpeed's engine steps after it. Leave "
            "it out; ZeRO divides the gradients over the ranks already."
        )
    if reduce_to_owner:
        raise UnsupportedError(
            f"{spec.name}: reduce_to_owner=True changes where FSDP2's backward sends gradients, and DeepSpeed's engine "
            "sends them to its partitions. Leave it out: under ZeRO-1 and 2 most tensors lie whole with their owner."
        )
    if on_nonfinite is not None:
        raise UnsupportedError(
            f"{spec.name}: on_nonfinite={on_nonfinite!r} looks at gradients before a step, which DeepSpeed's engine "
            "does itself: ZeRO stages 1 to 3 leave such a step out on all ranks (engine.skipped_steps counts; in bf16 "
            'as "bf16": {"check_grad_overflow": ...} says, which is true where it is not set). Leave on_nonfinite out.'
        )


def _build(model: nn.Module, name: str, parameters: Any, options: Mapping[str, Any]) -> ZeroOptimizer:
    """From a section of the JSON: ``options`` are its ``params``."""
    if "print_audit" in options:
        raise HyperparameterError('"optimizer": "params" has no key \'print_audit\'. Remove it.')
    own = {"params": parameters, **options}
    if "params" in options and parameters is not None:
        _refuse_two_lists(model, list(parameters))
    return build_optimizer_for_engine(model, name.removeprefix(PREFIX), **own)


def _refuse_two_lists(model: nn.Module, parameters: list[Any]) -> None:
    """Groups in the JSON are of all that is trained; so has to be what the call lists."""
    if {id(one) for one in parameters} != {id(one) for one in model.parameters() if one.requires_grad}:
        raise HyperparameterError(
            '"optimizer": "params" has groups under "params", and deepspeed.initialize was given model_parameters of '
            "its own. Leave out one of the two."
        )


def _attach(engine: Any, optimizer: ZeroOptimizer) -> None:
    """Refuse what is not served, read the layout, and say on rank 0 what will be trained how."""
    if optimizer.is_attached:
        return
    together(lambda: refuse_unserved(engine))
    optimizer.attach(engine)
    watch_ranks(timeout_s=optimizer.rank_timeout_s)
    if own_rank() == 0 and optimizer.print_audit:
        clip = engine.gradient_clipping()
        said = f"to a norm of {clip:g}" if clip > 0 else "not at all"
        print(optimizer.route_audit(), flush=True)
        if Trait.FUSED_BACKWARD in optimizer.spec.traits:
            print(
                "  stepped by DeepSpeed after backward, from stored gradients: the same weights, more memory",
                flush=True,
            )
        print(f'  DeepSpeed clips gradients {said} ("gradient_clipping"; 1.0 where it is not set)', flush=True)
