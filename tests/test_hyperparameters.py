"""Hyperparameters: read as what they are, checked against their records, refused with the known ones."""

from __future__ import annotations

import pytest

import dist_optim
from dist_optim.errors import HyperparameterError, MissingPackageError, UnknownOptimizerError
from dist_optim.specs.hyperparameters import parse_optim_args


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=64, scale=0.25", {"rank": 64, "scale": 0.25}),
        ("betas=(0.9, 0.95),proj_type=std", {"betas": (0.9, 0.95), "proj_type": "std"}),
        ("nesterov=False, amsgrad=true, max_lr=None", {"nesterov": False, "amsgrad": True, "max_lr": None}),
        ("lr=1e-3", {"lr": 1e-3}),
        ("proj_type='a, b'", {"proj_type": "a, b"}),
        ("  ", {}),
        ("", {}),
        (None, {}),
        ("rank=64,", {"rank": 64}),
    ],
)
def test_optim_args_are_read_as_what_they_are(text: str | None, expected: dict[str, object]) -> None:
    parsed = parse_optim_args(text)
    assert parsed == expected
    assert [type(value) for value in parsed.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("text", ["rank", "rank=", "=3", "rank=1, rank=2", "two words=3"])
def test_unreadable_optim_args_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(HyperparameterError, match=r"key=value|twice"):
        parse_optim_args(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rnak": 3}, r"no hyperparameter 'rnak'. Did you mean 'rank'\?.*update_proj_gap \(int >= 1\)"),
        ({"rank": 0}, r"rank=0 .*int >= 1"),
        ({"rank": 8.0}, r"rank=8.0 \(float\)"),
        ({"rank": True}, r"rank=True \(bool\)"),
        ({"rank": "many"}, r"rank='many'"),
        ({"betas": (0.9, 1.0)}, r"2 floats >= 0 and < 1"),
        ({"betas": 0.9}, r"betas=0.9"),
        ({"lr": -1.0}, r"lr=-1.0"),
        ({"lr": float("nan")}, r"lr=nan"),
        ({"proj_type": "sideways"}, r"'std', 'reverse_std'"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(given: dict[str, object], message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        dist_optim.get_spec("galore_adamw").check(given)


def test_strings_are_read_as_the_literals_they_spell() -> None:
    checked = dist_optim.get_spec("sgd").check({"nesterov": "False", "lr": "1e-2", "momentum": 0})
    assert checked["nesterov"] is False
    assert checked["lr"] == 1e-2
    assert isinstance(checked["momentum"], float)


def test_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownOptimizerError, match=r"nearest names are: galore_adamw"):
        dist_optim.get_spec("galore-adam")
    assert issubclass(UnknownOptimizerError, ValueError)


def test_missing_package_is_answered_with_the_pip_line() -> None:
    spec = dist_optim.OptimizerSpec(
        name="elsewhere",
        load=dist_optim.UpstreamClass("no_such_package_here", "Thing"),
        package="no-such-package",
        traits=frozenset({dist_optim.Trait.ELEMENTWISE}),
    )
    with pytest.raises(MissingPackageError, match="pip install no-such-package"):
        spec.load_class()
    assert issubclass(MissingPackageError, ImportError)


def test_registered_names_are_never_replaced() -> None:
    spec = dist_optim.get_spec("sgd")
    dist_optim.register(spec)
    with pytest.raises(ValueError, match="already registered"):
        dist_optim.register(dist_optim.OptimizerSpec(name="sgd", load=spec.load, package="x", traits=frozenset()))
