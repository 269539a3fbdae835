"""Which code is an optimizer class's own, and which lines of it there are.

Own code is that of the class and its bases up to ``torch.optim.Optimizer``, and of every function that a step calls in
the class's top-level package, or in its script. torch is trusted: what it does to a tensor is seen by the trace.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from types import CodeType

from torch.optim import Optimizer

__all__ = ["OwnCode", "lines_of", "nested"]


class OwnCode:
    """The files that hold a class's own code.

    A *place* is a file, or a folder with a separator at its end, which stands for all files below it.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self._folders = tuple(place for place in places if place.endswith(os.sep))
        self._files = {place for place in places if not place.endswith(os.sep)}

    def has(self, filename: str) -> bool:
        """Whether code of this file is the class's own."""
        return filename in self._files or (bool(self._folders) and filename.startswith(self._folders))

    @property
    def files(self) -> frozenset[str]:
        """Those that are named one by one: they hold the class and its bases."""
        return frozenset(self._files)

    @property
    def folders(self) -> tuple[str, ...]:
        """Those of packages."""
        return self._folders

    @classmethod
    def of(cls, optimizer_class: type[Optimizer]) -> OwnCode:
        """Own code of a class, bases included; empty for torch's own classes."""
        places: set[str] = set()
        for kind in optimizer_class.__mro__:
            package = kind.__module__.partition(".")[0]
            if kind in (Optimizer, object) or package in ("torch", "typing", "abc", "builtins"):
                continue
            places |= {code.co_filename for code in _methods(kind)}
            source = getattr(sys.modules.get(package), "__file__", None)
            if source is not None and os.path.basename(source) == "__init__.py":
                places.add(os.path.dirname(source) + os.sep)
        return cls(places)


def _methods(kind: type) -> Iterator[CodeType]:
    """Code of the functions that a class defines, without decorators."""
    for value in vars(kind).values():
        for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if isinstance(code, CodeType) and not code.co_filename.startswith("<"):
                yield code


def nested(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of the functions that are written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested(constant)


@lru_cache(maxsize=256)
def lines_of(filename: str) -> frozenset[int]:
    """Every line of the functions in a file that something can be seen to run; its first line stands for being called.

    Lines that only raise are left out: an exception there is an exception anyway. Empty where there is no source.
    """
    source = "".join(linecache.getlines(filename))
    if not source:
        return frozenset()
    tree = ast.parse(source, filename)
    found: set[int] = set()
    for code in nested(compile(tree, filename, "exec", dont_inherit=True)):
        if code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED:  # no module, no class body
            found |= {line for _, _, line in code.co_lines() if line} | {code.co_firstlineno}
    return frozenset(found - _raising(tree))


def _raising(tree: ast.AST) -> set[int]:
    """Lines of statements that raise."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
