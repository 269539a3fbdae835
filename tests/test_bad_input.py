"""Whatever is given in the place of an argument: it is taken, or refused by an error that says what to pass instead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placements import full_parameters
from torch import Tensor, nn

import dist_optim
from dist_optim.errors import DistOptimError, HyperparameterError, ParameterError, RankFailedError
from dist_optim.ranks.agreement import gather_objects
from dist_optim.specs.hyperparameters import problem_of
from dist_optim.testing import RankPool, assert_equal

few = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, 1e-3, -1.0, math.inf, -math.inf, math.nan, 10**400, 1e308, 2**70]),
    st.floats(),
)
WORDS = st.sampled_from(
    ["", "lr", "0.weight", "weight", "all-linear", "sgd", "(", "nan", "inf", "1e-3", "False", "\x00"]
)
THINGS = st.sampled_from(
    [
        *(None, True, False, 1j, b"bytes", object(), int, len, nn.Linear, torch.optim.SGD, {"a": 1}, {1, 2}),
        *(torch.zeros(()), torch.zeros(2, 2), torch.tensor(math.nan), nn.Parameter(torch.zeros(2)), range(2)),
    ]
)
ANYTHING = st.recursive(st.one_of(NUMBERS, WORDS, THINGS), lambda inner: st.lists(inner, max_size=2), max_leaves=3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))


def step(model: nn.Module, optimizer: dist_optim.DistributedOptimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def answer(call: Callable[[], Any]) -> Any:
    """What it returns, or its error, which is one that foresaw the mistake: none that some code happened to raise."""
    try:
        return call()
    except DistOptimError as error:
        assert type(error) is not RankFailedError and " failed with " not in str(error), error
        return error


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Building ---------------------------------------------------------------------------------------------------------


@few
@given(ANYTHING, st.sampled_from(["model", "optimizer", "params", "no_decay", "target_modules", "process_group"]))
def test_anything_for_a_model_a_name_or_a_list_is_taken_or_refused(value: Any, where: str) -> None:
    model, name = net(), "galore_adamw" if where == "target_modules" else "sgd"
    arguments = {"model": model, "optimizer": name, "lr": 0.1, "print_audit": False, where: value}
    found = answer(lambda: dist_optim.build_optimizer(**arguments))
    if isinstance(found, dist_optim.DistributedOptimizer):
        step(model, found)
    else:
        assert not isinstance(found, HyperparameterError) or where in ("optimizer", "no_decay")


@few
@given(ANYTHING, st.sampled_from(["bucket_bytes", "check_ranks_every", "fused_backward", "print_audit"]))
def test_a_setting_is_taken_where_it_means_something_alone(value: Any, where: str) -> None:
    means_something = {
        "bucket_bytes": is_whole(value) and value > 0,
        "check_ranks_every": is_whole(value) and value >= 0,
        "fused_backward": value is True or value is False or value is None,
        "print_audit": value is True or value is False,
    }
    found = answer(lambda: dist_optim.build_optimizer(net(), "sgd", lr=0.1, **{"print_audit": False, where: value}))
    assert isinstance(found, HyperparameterError) is not means_something[where]


NAMES = ("sgd", "adamw_torch", "stable_adamw", "adafactor", "grokadamw", "schedule_free_adamw", "apollo_adamw")
KEYS = [(name, record.name) for name in NAMES for record in dist_optim.get_spec(name).records()]


@settings(few, max_examples=150)
@given(NUMBERS, st.sampled_from(KEYS))
def test_no_hyperparameter_is_infinite_or_nan(value: float, key: tuple[str, str]) -> None:
    """At building, and from the step on after it was written into a param group."""
    name, hyperparameter = key
    spec = dist_optim.get_spec(name)
    required = {record.name: 1 for record in spec.records() if record.required}
    found = answer(lambda: spec.check({**required, hyperparameter: value}))
    is_finite = is_whole(value) or math.isfinite(value)
    assert is_finite or isinstance(found, HyperparameterError)
    written = problem_of(name, lambda _: spec.records(), [{}, {hyperparameter: value}])
    assert (written is None) == (not isinstance(found, HyperparameterError))
    if written is not None:
        assert f"param_groups[1]['{hyperparameter}']" in str(written) and "No parameter was changed" in str(written)


class Described:
    """What nobody has described: a class's own constructor names its hyperparameters."""

    class Plain(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, clip: float = math.inf) -> None:
            super().__init__(params, lr=lr)

    class Through(torch.optim.AdamW):
        def __init__(self, params: Any, *, own: float = 0.0, **rest: Any) -> None:
            super().__init__(params, eps=1e-6, **rest)

    class Named(torch.optim.SGD):
        def __init__(self, named_parameters: Any, lr: float = 0.1) -> None:
            super().__init__([parameter for _, parameter in named_parameters], lr=lr)
            self.names = tuple(name for name, _ in named_parameters)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_undescribed_class_gets_no_infinity_either_but_its_own_default(value: float) -> None:
    def build(**given: Any) -> Any:
        return dist_optim.build_optimizer(net(), Described.Plain, print_audit=False, **given)

    with pytest.raises(HyperparameterError, match="lr=.*is not allowed. lr is finite"):
        build(lr=value)
    optimizer = build(lr=0.1, clip=math.inf)
    optimizer.param_groups[0]["lr"] = value
    with pytest.raises(HyperparameterError, match=r"param_groups\[0\]\['lr'\]"):
        optimizer.step()


def test_hyperparameters_behind_keywords_are_those_of_the_bases() -> None:
    """The base's defaults stay its own affair: ``eps`` is what the class passes on."""
    optimizer = dist_optim.build_optimizer(
        net(), Described.Through, betas=(0.5, 0.9), weight_decay=0.3, print_audit=False
    )
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["eps"], group["lr"]) == ((0.5, 0.9), 0.3, 1e-6, 1e-3)
    with pytest.raises(HyperparameterError, match=r"no hyperparameter 'momentum'.*own.*lr.*betas"):
        dist_optim.build_optimizer(net(), Described.Through, momentum=0.9, print_audit=False)
    with pytest.raises(HyperparameterError, match="multiple values for keyword argument 'eps'"):
        dist_optim.build_optimizer(net(), Described.Through, eps=1e-4, print_audit=False)


def test_a_class_that_takes_named_parameters_gets_their_logical_names() -> None:
    model = net()
    optimizer = dist_optim.build_optimizer(model, Described.Named, lr=0.1, print_audit=False)
    assert tuple(name for name, _ in model.named_parameters()) == optimizer.names


def test_named_parameters_and_what_schedules_write_are_taken_as_torch_takes_them() -> None:
    model = net()
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, params=model.named_parameters(), print_audit=False)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert all("initial_lr" in group for group in optimizer.param_groups)
    groups = [{key: group[key] for key in ("params", "lr", "initial_lr")} for group in optimizer.param_groups]
    again = dist_optim.build_optimizer(model, "sgd", lr=0.1, params=groups, print_audit=False)
    assert torch.optim.lr_scheduler.ConstantLR(again, last_epoch=4).base_lrs == [0.1]


@few
@given(ANYTHING, st.sampled_from(["lr", "momentum", "weight_decay", "dampening", "nesterov"]))
def test_what_is_written_into_a_group_is_stepped_by_or_refused_and_changes_nothing(value: Any, key: str) -> None:
    model = net()
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    before = full_parameters(model)
    optimizer.param_groups[0][key] = value
    found = answer(lambda: step(model, optimizer))
    if isinstance(found, DistOptimError):
        assert isinstance(found, HyperparameterError), found
        assert_equal(full_parameters(model), before)
        optimizer.param_groups[0][key] = {"lr": 0.1}.get(key, False if key == "nesterov" else 0.0)
        step(model, optimizer)
    assert all(bool(parameter.isfinite().all()) or abs(value) > 1e30 for parameter in model.parameters())


# Schedules --------------------------------------------------------------------------------------------------------

ARGUMENTS = (
    *("optimizer", "schedule", "num_training_steps", "num_warmup_steps", "greater_is_better", "metric_from_rank"),
    *("on_nonfinite", "log_path", "stepped_by_engine", "process_group", "factor", "patience"),
)


@settings(few, max_examples=150)
@given(ANYTHING, st.sampled_from(ARGUMENTS), st.sampled_from(["linear", "cosine", "reduce_lr_on_plateau", "StepLR"]))
def test_anything_for_a_schedule_is_taken_or_refused(value: Any, where: str, schedule: str) -> None:
    optimizer = dist_optim.build_optimizer(net(), "sgd", lr=0.1, print_audit=False)
    options: dict[str, Any] = {"StepLR": {"step_size": 2}, "linear": {"num_training_steps": 5}}.get(schedule, {})
    options |= {"num_training_steps": 5} if schedule == "cosine" else {}
    if where == "log_path" and isinstance(value, str):
        value = None  # a file
    arguments = {"optimizer": optimizer, "schedule": schedule, **options, where: value}
    answer(lambda: dist_optim.build_scheduler(**arguments))


# On several ranks -------------------------------------------------------------------------------------------------

MODEL: Mapping[str, Callable[[nn.Module], Any]] = {
    "generator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "groups": lambda model: [{"params": list(model.parameters())}],
    "nothing": lambda model: None,
    "empty": lambda model: nn.ReLU(),
    "lazy": lambda model: nn.LazyLinear(3),
}
CASES: dict[str, tuple[type[DistOptimError], str, dict[str, Any]]] = {
    "generator": (ParameterError, r"was given a generator.*build_optimizer\(model, name, params=", {}),
    "list": (ParameterError, r"was given a list", {}),
    "groups": (ParameterError, r"was given a list.*or for groups", {}),
    "nothing": (ParameterError, "takes a torch.nn.Module, and was given None", {}),
    "empty": (ParameterError, "ReLU has no parameters", {}),
    "lazy": (ParameterError, "'weight' has no shape yet", {}),
    "params": (ParameterError, "params=3 is no list of parameters", {"params": 3}),
    "params as a set": (ParameterError, "params is a set, whose order can differ", {"params": {1}}),
    "params of names": (
        ParameterError,
        "'weight' of group 0 matches no parameter",
        {"params": ["weight"]},
    ),
    "targets": (dist_optim.errors.TargetModulesError, "target_modules=3 is not", {"target_modules": 3}),
    "one name": (ParameterError, r"no_decay='0.bias' is one string.*\['0.bias'\]", {"no_decay": "0.bias"}),
    "no name": (ParameterError, "no_decay names 'bias', which is no.*nearest are: .*0.bias", {"no_decay": ["bias"]}),
    "bucket": (HyperparameterError, "bucket_bytes=0 is not", {"bucket_bytes": 0}),
    "fraction": (HyperparameterError, "check_ranks_every=0.5 is not", {"check_ranks_every": 0.5}),
    "eps": (HyperparameterError, "eps=inf .*is not allowed", {"eps": math.inf}),
    "scale": (HyperparameterError, "scale=nan .*is not allowed", {"scale": math.nan}),
}


def refused_on_all_ranks(ranks: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """The class and text that every rank raises, where only these ranks make the mistake."""
    found = {}
    for case, (_, _, wrong) in CASES.items():
        is_wrong = dist.get_rank() in ranks
        model = MODEL[case](net()) if is_wrong and case in MODEL else net()
        options = {"lr": 1e-2, "rank": 2, "target_modules": "all-linear", **(wrong if is_wrong else {})}
        try:
            dist_optim.build_optimizer(model, "galore_adamw", print_audit=False, **options)
            own = ("nothing", "")
        except DistOptimError as error:
            own = (type(error).__name__, re.sub(r"^\[from rank \d+\] ", "", str(error)))
        everyones = gather_objects(own)
        found[case] = own if set(everyones) == {own} else ("ranks differ", str(everyones))
    return found


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["all", "one"])
def test_mistakes_are_refused_on_all_ranks_by_the_same_words(ranks: tuple[int, ...], two_ranks: RankPool) -> None:
    found = two_ranks.run(refused_on_all_ranks, ranks)[0]
    for case, (error, message, _) in CASES.items():
        kind, text = found[case]
        assert kind == error.__name__ and re.search(message, text, flags=re.DOTALL), f"{case}: {kind}: {text}"


def written_on_one_rank(name: str, is_fused: bool, key: str, value: Any) -> str:
    model = net()
    optimizer = dist_optim.build_optimizer(
        nn.parallel.DistributedDataParallel(model), name, lr=0.1, fused_backward=is_fused, print_audit=False
    )
    before = full_parameters(model)
    if dist.get_rank() == 1:
        optimizer.param_groups[0][key] = value
    with pytest.raises(HyperparameterError) as caught:
        loss: Tensor = optimizer.inside_backward and model(torch.ones(2, 4)).square().mean()  # type: ignore[assignment]
        loss.backward() if is_fused else step(model, optimizer)
    assert_equal(full_parameters(model), before)
    return str(caught.value)


@pytest.mark.parametrize("is_fused", [False, True], ids=["stored", "fused"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", math.nan, "param_groups[0]['lr'] = nan (float) is not allowed"),
        ("maximize", True, "param_groups[0]['maximize'] = True, where upstream has False."),
    ],
    ids=["no number", "not handed on"],
)
def test_a_wrong_value_on_one_rank_is_noticed_on_all_before_anything_changes(
    key: str, value: Any, message: str, is_fused: bool, two_ranks: RankPool
) -> None:
    for text in two_ranks.run(written_on_one_rank, "sgd", is_fused, key, value):
        assert message in text


@pytest.mark.parametrize(
    "name", ["adamw_torch", "sgd", "schedule_free_adamw", "adafactor", "galore_adamw", "grokadamw", "prodigy", "muon"]
)
def test_every_value_of_a_group_is_stepped_by_or_refused(name: str) -> None:
    """A stock optimizer reads what is written into its groups: what dist_optim hands to upstream, or says that not."""
    model = net()
    options: dict[str, Any] = {"rank": 2, "target_modules": "all-linear"} if name == "galore_adamw" else {}
    optimizer = dist_optim.build_optimizer(model, name, lr=1e-2, print_audit=False, **options)
    optimizer.train()
    step(model, optimizer)
    before = full_parameters(model)
    for group in optimizer.param_groups:
        for key in group.keys() - optimizer.holdings.pushed_keys - {"params", "param_names", "optim"}:
            was = group[key]
            group[key] = "another"
            with pytest.raises(HyperparameterError, match=re.escape(f"[{key!r}] = 'another'")):
                step(model, optimizer)
            group[key] = was
    assert_equal(full_parameters(model), before)
    step(model, optimizer)


def maximize_under_zero() -> str:
    import zero

    run = zero.ZeroRun("sgd", {"lr": 1e-3}, 2)
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(1))
    engine.optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(HyperparameterError) as caught:
        zero.train_engine(engine, run, range(1, 2))
    return str(caught.value)


def test_a_value_that_is_not_handed_on_is_refused_under_deepspeed(two_ranks: RankPool) -> None:
    pytest.importorskip("deepspeed")
    for text in two_ranks.run(maximize_under_zero):
        assert "param_groups[0]['maximize'] = True, where upstream has False." in text


def build_where_ranks_differ(what: str) -> str:
    """One rank runs another version, or asks for something else."""
    from unittest import mock

    from dist_optim.building import alike

    is_other = dist.get_rank() == 1
    options: dict[str, Any] = {}
    if is_other and what == "no_decay":
        options = {"no_decay": ["0.bias", "1.weight", "1.bias"]}
    elif what == "no_decay":
        options = {"no_decay": ["1.bias", "1.weight"]}
    elif is_other and what != "torch":
        options = {what: 7}
    version = alike.version_of
    changed = lambda name: "2.9.0" if name == "torch" and is_other else version(name)  # noqa: E731
    with mock.patch.object(alike, "version_of", changed if what == "torch" else version):
        error = answer(lambda: dist_optim.build_optimizer(net(), "sgd", lr=0.1, print_audit=False, **options))
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("torch", "the version of torch is '2.*' on rank 0 and '2.9.0' on rank 1. Start every rank in the same"),
        ("bucket_bytes", "bucket_bytes is 67108864 on rank 0 and 7 on rank 1"),
        ("check_ranks_every", "check_ranks_every is 0 on rank 0 and 7 on rank 1"),
        ("weight_decay", "weight_decay"),
        ("no_decay", "the group of '0.bias' is 0 on rank 0 and 1 on rank 1"),
    ],
)
def test_ranks_that_run_or_ask_for_other_things_are_named(what: str, message: str, two_ranks: RankPool) -> None:
    for text in two_ranks.run(build_where_ranks_differ, what):
        assert re.match(f"RanksDisagreeError: .*{message}", text), text


def test_texts_of_values_are_the_same_on_every_rank() -> None:
    from dist_optim.building.alike import described

    assert described({"b", "a"}) == ["'a'", "'b'"]
    assert described([len, nn.Linear]) == ["builtins.len", "torch.nn.modules.linear.Linear"]
    assert described({"x": (object(),)}) == {"x": ["<object object>"]}
    assert described(torch.zeros(2, 3)) == "tensor of shape (2, 3)" and described(torch.tensor(0.5)) == 0.5
