"""The table of parity cases: one file a family, each with a tuple ``CASES``; a new optimizer is a new row."""

import importlib
import pkgutil

from parity import Case


def all_cases() -> list[Case]:
    """Every family's rows."""
    modules = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return [case for module in modules for case in importlib.import_module(f"{__name__}.{module}").CASES]
