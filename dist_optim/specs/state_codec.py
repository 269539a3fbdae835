"""State of any shape as plain tensors and one readable text, and back: nothing in it is executed.

A *tree* is what JSON holds: numbers and strings as they are, tensors by the name of a leaf, parameters by their index,
and everything else as ``{kind: ...}``. What is filled in place (``restore``) may also hold code, which stays as it is
there, and random generators. Objects are their class's name and their ``__dict__``; they are made again without their
constructor, and only of classes that the running program has imported and that add nothing to making or dropping an
object.
"""

from __future__ import annotations

import enum
import functools
import json
import sys
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_optim.errors import StateDictError

__all__ = ["Leaves", "decode", "encode", "has_content", "is_plain", "parameters_in", "restore"]

Leaves = dict[str, Tensor]
_SCALARS = (bool, int, float, str, type(None))
_SEQUENCES: Mapping[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)
IndexOf = Callable[[Tensor | int], Any] | None
"""Which parameter a tensor is; of a number, the tree of what it means: the id or the address of a parameter."""
_NAMED = (torch.dtype, torch.device, torch.memory_format, torch.layout)


def is_plain(value: Any) -> bool:
    """Whether a value is stored as it is, without a tree."""
    return isinstance(value, (Tensor, *_SCALARS))


def encode(value: Any, name: str, leaves: Leaves, index_of: IndexOf = None) -> Any:
    """The tree of a value; its tensors go among the leaves, under names that begin with ``name``.

    Args:
        value: What is to be stored.
        name: Where it is, for names and messages.
        leaves: Receives the tensors.
        index_of: Which parameter a tensor is, or a number means, where the tree will be read by ``restore``; None for
            ``decode``.

    Raises:
        StateDictError: There is something in it that is no data.
    """
    kind = type(value)
    if kind is int and index_of is not None and (reference := index_of(value)) is not None:
        return reference
    if isinstance(value, enum.Enum):
        return {"enum": _class_name(value, name), "name": value.name}
    if kind in _SCALARS:
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, leaves, index_of)
    if isinstance(value, _NAMED):
        return {"torch": str(value), "kind": kind.__name__}
    for label, sequence in _SEQUENCES.items():
        if kind is sequence:
            items = [encode(item, f"{name}.{at}", leaves, index_of) for at, item in enumerate(value)]
            if "set" in label:
                items.sort(key=json.dumps)  # its own order is another one in each process
            return {label: items, **({"maxlen": value.maxlen} if label == "deque" else {})}
    if isinstance(value, dict):
        return _encode_dict(value, name, leaves, index_of)
    if isinstance(value, torch.Size):
        return {"torch": "Size", "kind": "Size", "of": list(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [encode(item, f"{name}.{at}", leaves, index_of) for at, item in enumerate(value)]
        return {"fields": _class_name(value, name), "items": items}
    if kind.__module__ == "numpy":
        return _encode_numpy(value, name, leaves)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if index_of is not None and isinstance(value, _CODE):
        return {"kept": getattr(value, "__qualname__", kind.__qualname__)}
    if index_of is not None and isinstance(value, torch.Generator):
        leaves[name] = value.get_state()
        return {"generator": name}
    own = dict(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, _CODE) else None
    if own is None or _why_not_made(kind):
        raise StateDictError(f"{name} is a {kind.__module__}.{kind.__qualname__}, which is no data that can be saved.")
    return {"object": _class_name(value, name), "items": _encode_dict(own, name, leaves, index_of)["dict"]}


def decode(tree: Any, leaves: Mapping[str, Tensor], parameter_of: Callable[[int], Tensor] | None = None) -> Any:
    """The value of a tree, with the leaves that belong to it.

    Raises:
        StateDictError: The tree is damaged, or names a class that is not there or not made so.
    """
    if not isinstance(tree, dict):
        return tree
    try:
        return _decode(tree, leaves, parameter_of)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise StateDictError(f"Saved state is damaged: {type(error).__name__}: {error}.") from error


def restore(existing: Any, tree: Any, leaves: Mapping[str, Tensor], parameter_of: Callable[[int], Tensor]) -> Any:
    """As ``decode``, but objects, lists and dicts that are there already are filled in place.

    So what two of them share, they share afterwards. Returns what stands in the place of ``existing`` now.
    """
    if not isinstance(tree, dict) or "kept" in tree:
        return existing if isinstance(tree, dict) else tree
    if "generator" in tree:
        return existing.set_state(leaves[tree["generator"]].cpu())
    if "object" in tree and type(existing) is _class_of(tree["object"]):
        for key, item in _pairs(tree["items"], leaves, parameter_of):
            vars(existing)[key] = restore(vars(existing).get(key), item, leaves, parameter_of)
        return existing
    if "dict" in tree and isinstance(existing, dict):
        items = _pairs(tree["dict"], leaves, parameter_of)
        pairs = [(key, restore(existing.get(key), item, leaves, parameter_of)) for key, item in items]
        existing.clear()
        existing.update(pairs)
        return existing
    if "list" in tree and isinstance(existing, list):
        old = existing + [None] * len(tree["list"])
        existing[:] = [restore(was, item, leaves, parameter_of) for was, item in zip(old, tree["list"], strict=False)]
        return existing
    if "tuple" in tree and isinstance(existing, tuple) and len(existing) == len(tree["tuple"]):
        both = zip(existing, tree["tuple"], strict=True)
        return tuple(restore(was, item, leaves, parameter_of) for was, item in both)
    return decode(tree, leaves, parameter_of)


def has_content(tree: Any) -> bool:
    """Whether there is more in a tree than references to parameters, names and switches: tensors, or fractions."""
    if isinstance(tree, dict):
        return not tree.keys().isdisjoint({"tensor", "numpy", "complex", "generator"}) or any(
            map(has_content, tree.values())
        )
    return any(map(has_content, tree)) if isinstance(tree, list) else isinstance(tree, float)


def parameters_in(tree: Any) -> Iterator[int]:
    """Indices of the parameters that a tree refers to."""
    if isinstance(tree, dict):
        yield from (tree[key] for key in ("parameter", "id of", "address of") if isinstance(tree.get(key), int))
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from parameters_in(item)


def _encode_tensor(value: Tensor, name: str, leaves: Leaves, index_of: IndexOf) -> Any:
    index = None if index_of is None else index_of(value)
    if index is not None:
        return {"parameter": index, "is_data": type(value) is not torch.nn.Parameter}
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise StateDictError(f"{name} is a {type(value).__name__}, a tensor of a kind that cannot be saved as it is.")
    known = next((leaf for leaf, tensor in leaves.items() if tensor is value), None)
    leaves.setdefault(known or name, value)
    return {"tensor": known or name, **({"parameter_class": True} if type(value) is torch.nn.Parameter else {})}


def _encode_dict(value: Mapping[Any, Any], name: str, leaves: Leaves, index_of: IndexOf) -> dict[str, Any]:
    items = []
    for at, (key, item) in enumerate(value.items()):
        # A number may be an id, another one in every process: names go by places then.
        is_name = (isinstance(key, str) and "/" not in key) or (isinstance(key, int) and 0 <= key < 1 << 16)
        inner = f"{name}.{key if is_name else at}"
        items.append([encode(key, f"{inner}.key", leaves, index_of), encode(item, inner, leaves, index_of)])
    default = {"of": "defaultdict"} if isinstance(value, defaultdict) else {}
    return {"dict": items, **default}


def _encode_numpy(value: Any, name: str, leaves: Leaves) -> dict[str, Any]:
    if not hasattr(value, "dtype") or value.dtype.kind not in "biuf":
        raise StateDictError(f"{name} is a numpy.{type(value).__name__}, which cannot be saved.")
    if value.ndim == 0:
        return {"numpy": str(value.dtype), "value": value.item()}
    leaves[name] = torch.from_numpy(value)
    return {"numpy": str(value.dtype), "tensor": name}


def _decode(tree: dict[str, Any], leaves: Mapping[str, Tensor], parameter_of: Callable[[int], Tensor] | None) -> Any:
    def inner(items: Sequence[Any]) -> list[Any]:
        return [decode(item, leaves, parameter_of) for item in items]

    if "parameter" in tree and parameter_of is not None:
        found = parameter_of(tree["parameter"])
        return found.data if tree["is_data"] else found
    if "id of" in tree and parameter_of is not None:
        return id(parameter_of(tree["id of"]))
    if "address of" in tree and parameter_of is not None:
        return parameter_of(tree["address of"]).data_ptr()
    if "numpy" in tree:
        import numpy

        return numpy.dtype(tree["numpy"]).type(tree["value"]) if "value" in tree else leaves[tree["tensor"]].numpy()
    if "tensor" in tree:
        found = leaves[tree["tensor"]]
        return torch.nn.Parameter(found, requires_grad=False) if "parameter_class" in tree else found
    if tree.get("kind") == "Size":
        return torch.Size(tree["of"])
    if "torch" in tree:
        return torch.device(tree["torch"]) if tree["kind"] == "device" else getattr(torch, tree["torch"][6:])
    if "complex" in tree:
        return complex(*tree["complex"])
    if "dict" in tree:
        pairs = {key: decode(item, leaves, parameter_of) for key, item in _pairs(tree["dict"], leaves, parameter_of)}
        return defaultdict(dict, pairs) if "of" in tree else pairs
    if "enum" in tree:
        return _member_of(tree["enum"], tree["name"])
    if "fields" in tree:
        made: Any = tuple.__new__(_class_of(tree["fields"]), inner(tree["items"]))
        return made
    if "object" in tree:
        made = object.__new__(_class_of(tree["object"]))
        vars(made).update(
            (key, decode(item, leaves, parameter_of)) for key, item in _pairs(tree["items"], leaves, parameter_of)
        )
        return made
    label = next(label for label in _SEQUENCES if label in tree)
    items = inner(tree[label])
    return deque(items, tree["maxlen"]) if label == "deque" else _SEQUENCES[label](items)


def _pairs(
    items: Sequence[Any], leaves: Mapping[str, Tensor], parameter_of: Callable[[int], Tensor] | None
) -> list[tuple[Any, Any]]:
    return [(decode(key, leaves, parameter_of), item) for key, item in items]


def _class_name(value: Any, name: str) -> str:
    kind = type(value)
    text = f"{kind.__module__}:{kind.__qualname__}"
    if "<locals>" in text:
        raise StateDictError(f"{name} is a {kind.__qualname__}, a class inside a function, which a load cannot find.")
    return text


def _class_of(text: str) -> Any:
    module, _, qualname = text.partition(":")
    found = _found(module, qualname)
    is_tuple = isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")
    if not isinstance(found, type) or not (is_tuple or not _why_not_made(found)):
        raise StateDictError(
            f"Saved state names the class {text!r}, which is not imported here, or makes its objects in a way of its "
            "own. Build the optimizer that was saved, with its package, and load again."
        )
    return found


def _member_of(text: str, name: str) -> Any:
    module, _, qualname = text.partition(":")
    kind: Any = _found(module, qualname)
    if not isinstance(kind, enum.EnumMeta) or name not in kind.__members__:
        raise StateDictError(f"Saved state names {name!r} of {text!r}, which is not there. Build what was saved.")
    return kind.__members__[name]


def _found(module: str, qualname: str) -> Any:
    """What a module that is imported has under a name; nothing is imported."""
    at: Any = sys.modules.get(module)
    for part in qualname.split("."):
        at = getattr(at, part, None)
    return at


def _why_not_made(kind: type) -> str:
    """Why an object of this class is not made from its ``__dict__`` alone; empty where it is."""
    makes: Any = kind.__new__
    if makes is not object.__new__:
        return "it has a __new__"
    return "it has a __del__" if hasattr(kind, "__del__") else ""
