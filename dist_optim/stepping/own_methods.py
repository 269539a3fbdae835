"""What a class that the user gave has beyond ``torch.optim.Optimizer``: methods, values, its own ``zero_grad``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dist_optim.errors import UnsupportedError
from dist_optim.ranks.agreement import gather_objects
from dist_optim.stepping.holdings import Holdings

__all__ = ["OwnMethods", "one_result"]

_PLAIN = (bool, int, float, str, tuple, type(None))


class OwnMethods:
    """Looks at the class, and at the instances of it, of which each rank has some. Nothing here is a collective.

    Described optimizers have none: what their classes offer is a matter of their family's file.
    """

    def __init__(self, held: Holdings) -> None:
        self._upstream = [instance.optimizer for instance in held.instances]
        self._class = held.spec.own_class() if held.spec.is_undescribed else Optimizer

    def has(self, name: str) -> bool:
        """Whether the class has a public method of this name, which torch's own base class has not."""
        return not name.startswith("_") and not hasattr(Optimizer, name) and callable(getattr(self._class, name, None))

    def has_value(self, name: str) -> bool:
        """Whether the class keeps a plain value under this public name."""
        return (
            self._class is not Optimizer
            and not name.startswith("_")
            and all(isinstance(vars(one).get(name, ...), _PLAIN) for one in self._upstream)
        )

    def value(self, name: str) -> Any:
        """The value, which is the same in all instances."""
        return vars(self._upstream[0])[name]

    def set_value(self, name: str, value: Any) -> None:
        """Set it in all instances of this rank."""
        for one in self._upstream:
            setattr(one, name, value)

    def zero_grad(self, set_to_none: bool) -> None:
        """What the class does besides; gradients themselves are the model's."""
        if getattr(self._class, "zero_grad", None) is not Optimizer.zero_grad:
            for one in self._upstream:
                one.zero_grad(set_to_none)


def one_result(name: str, results: list[tuple[Any, bool]], held: Holdings) -> tuple[Any, bool]:
    """What a method returned, the same from all instances on all ranks, and whether it cleared gradients. Collective.

    Raises:
        UnsupportedError: Instances returned other values, or what cannot be compared.
    """
    own = [(one if isinstance(one, _PLAIN) else ..., is_cleared) for one, is_cleared in results]
    flat = [pair for pairs in gather_objects(own, held.all_ranks) for pair in pairs]  # bystanders have none
    if any(one is ... or one != flat[0][0] for one, _ in flat):
        raise UnsupportedError(
            f"{name}() returns something else for each part of the model, and here each rank steps a part. Read what "
            "it is made of from optimizer.state, or use one process."
        )
    return flat[0][0], any(is_cleared for _, is_cleared in flat)
