"""Every name of another package that is overridden or read is in one table, and what is missing is said by name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compat import ROOT, lower_bounds

import dist_optim
from dist_optim import overrides
from dist_optim.errors import UnsupportedError
from dist_optim.overrides import TABLE, VERSIONS, Override, check, differences

PACKAGE = ROOT / "dist_optim"
READERS = ("integrations", "layouts", "inside_backward", "planning")
"""The rooms that touch engines. What `optimizers/` reads of an upstream package is measured with that package."""
ROWS = [row for rows in TABLE.values() for row in rows]
NAMES = {row.attribute for row in ROWS} | {name for row in ROWS for name in row.in_older.rpartition(":")[2].split(".")}
TRAINER = {row.attribute for row in TABLE["transformers"] if row.owner.endswith(":Trainer")}


def missing_rows(mixins: list[type], base: type, rows: set[str]) -> set[str]:
    """What the mixins override of the base class, and no row names."""
    own = {name for mixin in mixins for name, member in vars(mixin).items() if callable(getattr(mixin, name))}
    return {name for name in own if hasattr(base, name) and not hasattr(object, name)} - rows


def super_calls(folder: Path) -> set[str]:
    """Names that the files call on `super()`."""
    nodes = (node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    }


def private_names(sources: list[str]) -> tuple[set[str], set[str]]:
    """Private attributes that are read on anything but `self`; and names that these sources define."""
    read: set[str] = set()
    own: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (own if is_self else read).add(node.attr)
    return read, own


@pytest.mark.parametrize("integration", TABLE)
def test_what_is_installed_has_all_of_it(integration: str) -> None:
    assert not differences(TABLE[integration])
    check(integration)


def test_every_overridden_method_of_the_trainer_has_a_row() -> None:
    transformers = importlib.import_module("transformers")
    mixin = importlib.import_module("dist_optim.integrations.transformers.mixin")
    mixins = [kind for kind in mixin.DistOptimTrainerMixin.__mro__ if kind.__module__.startswith("dist_optim")]
    assert not missing_rows(mixins, transformers.Trainer, TRAINER)
    assert missing_rows(mixins, transformers.Trainer, TRAINER - {"_clip_grad_norm"}) == {"_clip_grad_norm"}, "control"
    called = super_calls(PACKAGE / "integrations" / "transformers")
    assert "_get_output_dir" in called and not {name for name in called if not name.startswith("__post")} - NAMES - {
        "set_optimizer"  # of TrainingArguments, public
    }


def test_every_private_attribute_of_an_engine_has_a_row() -> None:
    sources = {file: file.read_text() for file in PACKAGE.rglob("*.py")}
    _, own = private_names(list(sources.values()))
    engines = [text for file, text in sources.items() if file.relative_to(PACKAGE).parts[0] in READERS]
    read, _ = private_names(engines)
    assert {"_handle", "_optimizers", "_config"} <= read - own, "or this test sees nothing"
    assert not read - own - NAMES - {"_exit", "_local_scalar_dense"}  # of os; an operator of torch
    assert private_names(["engine._new_secret"])[0] - own - NAMES == {"_new_secret"}, "control"


class _Lacking:
    """A Trainer of another version."""

    def _clip_grad_norm(self, model: object, max_norm: float) -> None:
        self.model_wrapped = model


def test_what_a_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = f"{__name__}:_Lacking"
    rows = (
        Override("transformers", owner, "model_wrapped"),
        Override("transformers", owner, "_prepare_for_training"),
        Override("transformers", owner, "_clip_grad_norm", ("model",)),
        Override("transformers", owner, "_new_home", (), f"{__name__}:_Lacking._clip_grad_norm"),
        Override("transformers", owner, "_new_name", (), f"{__name__}:_Lacking._old_name"),
        Override("transformers", f"{__name__}:_Gone", "anything"),
        Override("transformers", f"{__name__}:_Gone", "something"),
    )
    monkeypatch.setitem(TABLE, "transformers", rows)
    monkeypatch.setattr(overrides.importlib.metadata, "version", lambda package: "5.0.0")
    with pytest.raises(UnsupportedError) as caught:
        check.__wrapped__("transformers")
    message = str(caught.value)
    assert message.startswith("transformers 5.0.0 is installed")
    assert "_Lacking._prepare_for_training is missing" in message
    assert "_Lacking._clip_grad_norm takes (model, max_norm), not (model)" in message
    assert message.count("_Gone is missing (module") == 1 and "model_wrapped" not in message
    assert "_new_name is missing" in message and "_new_home" not in message
    assert f"pip install 'transformers>={VERSIONS['transformers'][0]}," in message


def refuse(integration: str) -> None:
    raise UnsupportedError(f"{integration} was checked")


@pytest.mark.parametrize(
    ("module", "begin", "integration"),
    [
        ("integrations.accelerate.placing", lambda module: module._refuse(None, "adamw_torch"), "accelerate"),
        ("integrations.deepspeed.engine", lambda module: module.register(), "deepspeed"),
        ("layouts.detect_fsdp1", lambda module: module.places_by_parameter(None), "FSDP1"),
        ("layouts.detect_mesh", lambda module: module._cuts("weight", None), "FSDP2"),
        ("inside_backward.ddp", lambda module: module.why_not_this_ddp(None, None), "DDP"),
    ],
)
def test_an_integration_is_checked_where_it_is_used(
    module: str, begin: Callable[[Any], Any], integration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.import_module(f"dist_optim.{module}")
    monkeypatch.setattr(found, "check", refuse)
    monkeypatch.setattr(found, "_units", lambda model: [None], raising=False)
    monkeypatch.setattr(found, "_deepspeed_parts", lambda: (object, []), raising=False)
    with pytest.raises(UnsupportedError, match=f"{integration} was checked"):
        if error := begin(found):
            raise error


def test_the_trainer_is_checked_where_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a Trainer of another version would train without ever building its optimizer."""
    monkeypatch.setattr(overrides, "check", refuse)
    with pytest.raises(UnsupportedError, match="transformers was checked"):
        runpy.run_path(str(PACKAGE / "integrations" / "transformers" / "__init__.py"))


def test_known_versions_are_those_declared_and_pinned() -> None:
    bounds = lower_bounds()
    pins = [line.split(";")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[3:]]
    for package, (first, last) in VERSIONS.items():
        assert f"{first}.".startswith(f"{bounds[package]}."), package
        assert [package, last] in pins, package


def test_every_module_can_be_imported() -> None:
    modules = [found.name for found in pkgutil.walk_packages(dist_optim.__path__, "dist_optim.")]
    assert len(modules) > 60
    for name in modules:
        importlib.import_module(name)
