"""What upstream keeps of a tensor, and what it takes for a moment: its own class, stepped on tensors without storage.

A tensor of torch's ``FakeTensorMode`` has a shape and a dtype and no values, so that the true shapes of any model are
stepped in milliseconds by upstream's own code: no formula stands here that could go stale. Where upstream looks at a
value, it sees a one, or True. Triton kernels are not launched: they write to what upstream has made before.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_optim.errors import DistOptimError, UnsupportedError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Replicated
from dist_optim.overrides import check
from dist_optim.planning.model import is_like
from dist_optim.specs.driver import ParamGroup, tensors_in
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["Rehearsal", "Stepped"]

ANSWERS = ((1.0, False), (0.5, False), (1.0, True))
"""What upstream reads where it looks at a number, and whether kernels may be there: the first with which it runs. One
less a factor of one is no divisor; some modes are for kernels alone, and refuse what is on the CPU."""
STEPS = 3
"""The first makes the state, or a projection; some make a part of it in the second."""
LINE = (1 << 12, 1 << 13)
"""Elements of the slices between which, and beyond, an elementwise state grows along a line."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """Bytes of one tensor's step."""

    state: int
    """That upstream keeps."""
    scratch: int
    """That it takes besides, at most, and gives back: casts, products, an SVD's factors. Those of the CPU's code."""


class Rehearsal:
    """Steps tensors of a model as upstream would, each shape once.

    Args:
        spec: The optimizer.
        groups: Param groups; ``params`` lists ``PlacedParameter``.
        arguments: Constructor keywords for upstream.
        dtype: In which tensors are stepped.
        known: What was found before, by all that it depends on; more is added.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: Sequence[ParamGroup],
        arguments: Mapping[str, Any],
        dtype: torch.dtype,
        known: dict[Any, Any] | None = None,
    ) -> None:
        check("tensors without data")
        self._spec, self._groups, self._arguments, self._dtype = spec, groups, arguments, dtype
        self._known = {} if known is None else known
        self._values = [repr(_alike(group)) for group in groups]
        self._asked = (spec.name, repr(sorted(arguments.items())), frozenset(self._values), dtype)

    def whole(self, group: int, one: PlacedParameter) -> Stepped:
        """Of a tensor that is stepped whole."""
        return self._of(group, one, one.shape)

    def slices(self, group: int, one: PlacedParameter, numels: Tensor) -> tuple[Tensor, Tensor]:
        """State and scratch of so many elements of it, by an optimizer that steps any slice: linear in their number.

        Parts of one that keeps blocks are looked at each: there are few kinds, and limits of size between them.
        """
        if Trait.BLOCKWISE in self._spec.traits:
            counts = numels.tolist()
            found = {count: self._of(group, one, torch.Size([count])) for count in set(counts) - {0}}
            state = [found[count].state if count else 0 for count in counts]
            scratch = [found[count].scratch if count else 0 for count in counts]
            return torch.tensor(state, device="cpu"), torch.tensor(scratch, device="cpu")
        low, high = (self._of(group, one, torch.Size([count])) for count in LINE)

        def along(first: int, second: int) -> Tensor:
            found = first + (second - first) * (numels - LINE[0]) // (LINE[1] - LINE[0])
            return torch.where(numels > 0, found, 0).clamp(min=0)

        return along(low.state, high.state), along(low.scratch, high.scratch)

    def _of(self, group: int, one: PlacedParameter, shape: torch.Size) -> Stepped:
        named = is_like(one.fqn) if self._spec.driver.wants_names else ""
        key = (*self._asked, self._values[group], tuple(shape), named)
        if key not in self._known:
            self._known[key] = self._rehearsed(group, one, shape)
        found: Stepped = self._known[key]
        return found

    def _rehearsed(self, group: int, one: PlacedParameter, shape: torch.Size) -> Stepped:
        failure: Exception | None = None
        for value, has_kernels in ANSWERS:
            try:
                return self._run(group, one, shape, value, has_kernels)
            except DistOptimError:
                raise
            except Exception as error:  # upstream's own code, on tensors without values: any
                failure = failure or error
        raise UnsupportedError(
            f"{self._spec.name} cannot be planned: its class needs values, which are not there without data "
            f"({type(failure).__name__}: {failure}). Train a few steps of a small model instead; "
            "optimizer.optimizer_state_bytes() says what it keeps."
        ) from failure

    def _run(self, group: int, one: PlacedParameter, shape: torch.Size, value: float, has_kernels: bool) -> Stepped:
        watch = _Watch(value)
        stances = [torch.compiler.set_stance("force_eager"), *([_without_kernels()] if has_kernels else [])]
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors whose address somebody looks at
            for stance in (*stances, torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), watch):
                stack.enter_context(stance)
            # Two alike, as what both of them hold is not this tensor's own: bitsandbytes' tables, say.
            twins = range(group, group + (1 if self._spec.driver.wants_names else 2))
            groups = self._stand_ins(group, one, shape, len(twins))
            instance = UpstreamInstance(self._spec, groups, dict.fromkeys(twins, shape), self._arguments)
            scratch = 0
            for _ in range(STEPS):
                scratch = max(scratch, self._step(instance, twins, shape, watch))
            return Stepped(self._own_bytes(instance, twins), scratch)

    def _own_bytes(self, instance: UpstreamInstance, twins: Sequence[int]) -> int:
        driver = self._spec.driver
        first, *others = (
            {_key(one): one.untyped_storage().nbytes() for one in tensors_in(state)}
            for state in (driver.read_state(instance.optimizer, instance.shadows[index]) for index in twins)
        )
        return sum(nbytes for key, nbytes in first.items() if not any(key in other for other in others))

    def _step(self, instance: UpstreamInstance, twins: Sequence[int], shape: torch.Size, watch: _Watch) -> int:
        if self._spec.driver.needs_total_norm(self._arguments):
            self._spec.driver.take_total_norm(instance.optimizer, torch.ones((), device="cpu"))
        parameters, gradients = (
            {index: torch.zeros(shape, dtype=self._dtype, device="cpu") for index in twins} for _ in range(2)
        )
        watch.begin()
        instance.step(parameters, gradients, [True] * (len(self._groups) + len(twins) - 1))
        found = watch.end()
        instance.release(twins)
        return found

    def _stand_ins(self, group: int, one: PlacedParameter, shape: torch.Size, count: int) -> list[ParamGroup]:
        """Every group with one parameter, a ghost of its first; the group in question with as many as are stepped."""
        made = []
        for number, each in enumerate(self._groups):
            model = one if number == group else each["params"][0]
            own = shape if number == group else model.shape
            bare = torch.zeros((), dtype=self._dtype, device="cpu").expand(own)
            place = (own, Replicated(), None, number, model.is_trained)
            twins = range(count if number == group else 1)
            made.append({**each, "params": [PlacedParameter(model.fqn, nn.Parameter(bare), *place) for _ in twins]})
        return made


def _alike(group: ParamGroup) -> dict[str, Any]:
    """Its values; of a parameter's name, which some classes give to its group, what is alike in all layers."""
    values = {key: value for key, value in group.items() if key != "params"}
    return {**values, "name": is_like(str(values["name"]))} if "name" in values else values


class _Watch(TorchDispatchMode):
    """Answers for values that are not there, and counts the bytes that are taken and given back."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value
        self._taken: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0

    def begin(self) -> None:
        """Count from here."""
        self._taken, self._most = {}, 0

    def end(self) -> int:
        """Bytes that were taken at most, above what is left now."""
        return max(0, self._most - self._live())

    def _live(self) -> int:
        self._taken = {key: entry for key, entry in self._taken.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._taken.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else self._value if dtype.is_floating_point else 1
        if func is torch.ops.aten.is_nonzero.default:
            return True
        if func is torch.ops.aten.equal.default:
            return False
        given = {_key(one) for one in tree_leaves((args, kwargs)) if isinstance(one, FakeTensor)}
        out = func(*args, **(kwargs or {}))
        new = [one for one in tree_leaves(out) if type(one) is FakeTensor and _key(one) not in given]
        for one in new:
            storage = one.untyped_storage()
            self._taken.setdefault(_key(one), (StorageWeakRef(storage), storage.nbytes()))
        if new:
            self._most = max(self._most, self._live())
        return out


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """Let code for CUDA kernels run: tensors seem to be there, and no kernel is launched."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def launch_nothing(*args: Any, **keywords: Any) -> None:
        pass

    with contextlib.ExitStack() as stack:
        for kind in (JITFunction, Autotuner):
            stack.enter_context(mock.patch.object(kind, "run", launch_nothing))
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", True, create=True))
        if not torch.cuda.is_available():
            properties = SimpleNamespace(multi_processor_count=1)
            stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        yield


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
