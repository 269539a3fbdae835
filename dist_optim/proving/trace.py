"""Data flow between tensors, traced while an optimizer steps: which parameter did each value come from?

Parameters and gradients carry a tag, one bit for each parameter. A dispatch mode carries tags from what an operation
reads to what it writes and returns. Values that leave torch for Python carry none: such *host reads* are noted, and
tried by changing what they return (``reads.py``). What bypasses the dispatcher is caught by a function mode above it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["CommunicatesError", "Found", "Perturb", "Tags", "Trace", "is_mixed", "numbers"]

Perturb = tuple[int, Callable[[Any], Any]]
"""Tags whose host reads return something else, and what."""

COLLECTIVES = {"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"}
OVERWRITING = {"copy_", "zero_", "fill_", "_copy_from"}
LEAVING = {"numpy", "__array__", "__dlpack__", "__reduce_ex__", "__cuda_array_interface__"}
BYPASSING = LEAVING | {"tolist", "__deepcopy__"}
MAX_NOTED = 5
MAX_KEPT = 20_000
"""Storages whose tags are kept before those that are gone are looked for."""


class CommunicatesError(BaseException):
    """The class starts a collective: nothing that it may catch."""


def is_mixed(tags: int) -> bool:
    """Whether these tags are of more than one parameter."""
    return tags & (tags - 1) != 0


def numbers(tags: int) -> list[int]:
    """The parameters that these are tags of."""
    return [index for index in range(tags.bit_length()) if tags >> index & 1]


@dataclass(slots=True)
class Found:
    """What a trace has seen."""

    coupled: list[str] = field(default_factory=list)
    """How values of several parameters were mixed, or went where they cannot be followed; the first few."""
    reads: dict[str, int] = field(default_factory=dict)
    """Where in the code host reads are, and the tags of what they read."""
    first_read: dict[str, int] = field(default_factory=dict)
    """The step in which each was first seen."""
    draws: str = ""
    num_operations: int = 0

    def couple(self, how: str) -> None:
        """Note it, among the first few."""
        if len(self.coupled) < MAX_NOTED and how not in self.coupled:
            self.coupled.append(how)


class Tags:
    """The tags of every storage. Addresses are not used again while their weak reference is held."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, StorageWeakRef]] = {}

    def of(self, tensor: Tensor) -> int:
        """Tags of a tensor; of one that is made of others, theirs."""
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            return self.of_all(getattr(tensor, name) for name in names)
        found = self._of.get(tensor.untyped_storage()._cdata)
        return 0 if found is None else found[0]

    def of_all(self, tensors: Iterable[Tensor]) -> int:
        """The tags of all of these."""
        tags = 0
        for tensor in tensors:
            tags |= self.of(tensor)
        return tags

    def put(self, tensor: Tensor, tags: int) -> None:
        """Let a tensor carry these and no others."""
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                self.put(getattr(tensor, name), tags)
            return
        storage = tensor.untyped_storage()
        known = self._of.get(storage._cdata)
        self._of[storage._cdata] = (tags, StorageWeakRef(storage) if known is None else known[1])
        if len(self._of) > MAX_KEPT:
            self._of = {key: value for key, value in self._of.items() if not value[1].expired()}


class Trace:
    """A context in which tensor operations are traced. It may be entered again and again: tags stay.

    Args:
        perturb: Which host reads return something else.
    """

    def __init__(self, perturb: Perturb | None = None) -> None:
        self.tags, self.found, self.perturb = Tags(), Found(), perturb
        self.step = -1
        self.written: set[int] = set()
        """Storages that traced operations wrote to, since it was last cleared."""
        self._modes: tuple[_Function, _Dispatch] | None = None

    def __enter__(self) -> Trace:
        self._modes = (_Function(self), _Dispatch(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._modes is not None
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    # What the modes report ----------------------------------------------------------------------------------------

    def carry(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Tags go from what an operation read to what it wrote and returned."""
        name = func.overloadpacket.__name__
        if name.startswith(("_foreach", "_fused")):
            self._carry_columns(func, name, args, kwargs, out)
            return
        tags = self.tags.of_all(_tensors((args, kwargs)))
        written = _written(func, args, kwargs)
        for tensor in written:
            self._write(tensor, _without_old(self.tags, name, tensor, args) if name in OVERWRITING else tags, name)
        for tensor in _tensors(out):
            if all(tensor is not one for one in written):
                self.tags.put(tensor, tags | self.tags.of(tensor) if func._schema.is_mutable else tags)

    def _carry_columns(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Lists of tensors, of which each index is an operation of its own; single tensors are shared by all."""
        values = [*args, *kwargs.values()]
        lists = [value for value in values if isinstance(value, (list, tuple)) and _tensors(value)]
        shared = self.tags.of_all(value for value in values if isinstance(value, Tensor))
        lengths = {len(value) for value in lists}
        if len(lengths) > 1:  # not index by index
            shared |= self.tags.of_all(_tensors(lists))
        written = {id(tensor) for tensor in _written(func, args, kwargs)}
        for at in range(max(lengths, default=0)):
            column = [value[at] for value in lists if at < len(value) and isinstance(value[at], Tensor)]
            tags = shared | self.tags.of_all(column)
            for tensor in column:
                if id(tensor) in written:
                    self._write(tensor, tags, name)
            if isinstance(out, (list, tuple)) and at < len(out):
                for tensor in _tensors(out[at]):
                    self.tags.put(tensor, tags)

    def _write(self, tensor: Tensor, tags: int, name: str) -> None:
        self.tags.put(tensor, tags)
        if is_mixed(tags):
            self.found.couple(f"{name} mixes tensors {numbers(tags)} in step {self.step} at {_where()}")
        if not hasattr(tensor, "__tensor_flatten__"):
            self.written.add(tensor.untyped_storage()._cdata)

    def read(self, tags: int, value: Any) -> Any:
        """A host read: noted where it is tagged; returns what the class shall get."""
        if not tags:
            return value
        where = _where()
        self.found.reads[where] = self.found.reads.get(where, 0) | tags
        self.found.first_read.setdefault(where, self.step)
        if is_mixed(tags):
            self.found.couple(f"a value of tensors {numbers(tags)} is read in step {self.step} at {where}")
        if self.perturb is not None and self.perturb[0] & tags:
            return tree_map(self.perturb[1], value)
        return value

    def leave(self, name: str, tags: int) -> None:
        """Values go where nobody can follow them: as if mixed with all others."""
        if tags:
            self.found.couple(f"{name} takes values of tensors {numbers(tags)} where none can follow, at {_where()}")


class _Dispatch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its wrapper around every operation takes as long as the operation; nothing is compiled here

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the tensor class shows what it does as operations on plain tensors
        trace, kwargs = self.trace, kwargs or {}
        trace.found.num_operations += 1
        if func.namespace in COLLECTIVES:
            raise CommunicatesError(f"{func} at {_where()}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            trace.found.draws = trace.found.draws or f"{func} in step {trace.step} at {_where()}"
        out = func(*args, **kwargs)
        if isinstance(out, (bool, int, float, complex)):  # item(), equal(), allclose(): whatever Python can hold
            return trace.read(trace.tags.of_all(_tensors((args, kwargs))), out)
        trace.carry(func, args, kwargs, out)
        if torch.Tag.dynamic_output_shape in func.tags:
            trace.read(trace.tags.of_all(_tensors(out)), 0)  # Python learns a size: noted, and cannot be changed
        return out


class _Function(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in BYPASSING:
            return func(*args, **kwargs)
        if name in LEAVING:
            self.trace.leave(name, self.trace.tags.of_all(_tensors((args, kwargs))))
        out = func(*args, **kwargs)
        if name == "tolist":
            return self.trace.read(self.trace.tags.of_all(_tensors(args)), out)
        if name == "__deepcopy__" and isinstance(out, Tensor):
            self.trace.tags.put(out, self.trace.tags.of_all(_tensors(args[0])))
        return out


def _tensors(value: Any) -> list[Tensor]:
    """Tensors among the arguments or results of an operation; those are nested in lists, tuples and dicts alone."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    waiting = [value]
    while waiting:
        inside = waiting.pop()
        for one in inside.values() if isinstance(inside, dict) else inside if isinstance(inside, (list, tuple)) else ():
            if isinstance(one, Tensor):
                found.append(one)
            elif isinstance(one, (list, tuple, dict)):
                waiting.append(one)
    return found


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[at] if at < len(args) else kwargs.get(argument.name))
    return found


def _without_old(tags: Tags, name: str, written: Tensor, args: Sequence[Any]) -> int:
    """The tags of what is copied; with those of what was there, unless all of the storage is overwritten."""
    is_whole = written.numel() * written.element_size() == written.untyped_storage().nbytes()
    old = 0 if is_whole else tags.of(written)
    return old | tags.of_all(_tensors(list(args[1:])))


def _where() -> str:
    """File and line of the code that is being traced: the nearest frame of an optimizer, not of torch's machinery."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_TORCH = torch.__path__[0]
_OF_OPTIMIZERS = os.path.join(_TORCH, "optim")


def _is_machinery(filename: str) -> bool:
    return filename.startswith((_TORCH, "<", __file__)) and not filename.startswith(_OF_OPTIMIZERS)
