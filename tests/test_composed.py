"""Several algorithms in one object, against the separate upstream optimizers in one process: equal bits."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zero
from end_to_end import make_llama
from parity import Case, Together, gradients, make_model
from placements import full_parameters, inject, place
from torch import Tensor, nn
from zero import ZeroRun

import dist_optim
from dist_optim.building.hidden_matrices import hidden_matrices
from dist_optim.errors import HyperparameterError, ParameterError, StateDictError, UnsupportedError
from dist_optim.layouts import detect
from dist_optim.testing import RankPool, assert_no_problems_on_any_rank

STEPS = 6
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


class Centred(torch.optim.Optimizer):
    """A user's own: the step is less its mean, over a step counter in the group."""

    def __init__(self, params: Any, lr: float = 1e-2, power: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "power": power, "taken": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's has overloads
        for group in self.param_groups:
            group["taken"] += 1
            for one in group["params"]:
                if one.grad is not None and one.numel():
                    mean = self.state[one].setdefault("mean", torch.zeros_like(one)).lerp_(one.grad, 0.1)
                    one.sub_(mean - mean.mean(), alpha=group["lr"] / group["taken"] ** group["power"])


Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Mixture:
    """What is asked for, and the separate optimizers that it stands for."""

    params: list[dict[str, Any]]
    reference: Callable[[Named], Together]
    name: str = "muon"


def three_kinds(named: Named) -> Together:
    """Muon in two groups, schedule-free, which swaps weights, and StableAdamW, which takes betas once for all."""
    import optimi
    import schedulefree

    biases = [named[name] for name in named if name.endswith("bias")]
    matrices = [[named[f"linears.{at}.weight"] for at in part] for part in ((0, 1, 2), (3, 5))]
    others = [named[name] for name in named if name.startswith("extra")]
    rates = ({"params": matrices[0], "lr": 2e-2}, {"params": matrices[1], "lr": 1e-2, "weight_decay": 0.0})
    return Together(
        torch.optim.Muon(rates),
        schedulefree.AdamWScheduleFree(biases, lr=1e-2, warmup_steps=2),
        optimi.StableAdamW(others, lr=5e-3, betas=(0.9, 0.95), eps=1e-8, triton=False, weight_decay=0.0),
    )


def with_ghosts(named: Named) -> Together:
    """GrokAdamW decays by position among gradients, and a class that nobody described counts in its group."""
    import grokadamw

    linear = [named[name] for name in named if name.startswith("linears")]
    others = [named[name] for name in named if not name.startswith("linears")]
    return Together(grokadamw.GrokAdamW(linear, lr=1e-2, weight_decay=0.0), Centred(others, lr=1e-2, power=0.3))


def with_sums(named: Named) -> Together:
    """Prodigy's step size comes of sums over its tensors: one rank steps those, and Muon's too."""
    import prodigyopt

    matrices = [named[name] for name in named if name.startswith("linears") and named[name].ndim == 2]
    others = [named[name] for name in named if not (name.startswith("linears") and named[name].ndim == 2)]
    return Together(torch.optim.Muon(matrices, lr=1e-2), prodigyopt.Prodigy(others, lr=1.0, d0=1e-3))


MIXTURES = {
    "three kinds": Mixture(
        [
            {"params": "linears.[0-2].weight", "lr": 2e-2, "optim": "muon"},
            {"params": "*.bias", "optim": "schedule_free_adamw", "warmup_steps": 2},
            {"params": "linears.*.weight", "weight_decay": 0.0, "optim": "muon"},
            {"params": "*", "lr_scale": 0.5, "optim": "stable_adamw", "betas": (0.9, 0.95), "triton": False},
        ],
        three_kinds,
    ),
    "with ghosts": Mixture(
        [{"params": "linears.*"}, {"params": "extra.*", "optim": Centred, "power": 0.3}], with_ghosts, "grokadamw"
    ),
    "with sums": Mixture(
        [{"params": "linears.*.weight", "optim": "muon"}, {"params": "*", "optim": "prodigy", "lr": 1.0, "d0": 1e-3}],
        with_sums,
    ),
}
CASE = Case("adamw_torch", lambda groups: torch.optim.AdamW(groups), {"lr": 1e-2}, steps=STEPS)


def reference_run(mixture: Mixture) -> list[dict[str, Tensor]]:
    """Every parameter after every step, and at last with the averaged weights in place."""
    model = make_model(CASE)
    named = dict(model.named_parameters())
    optimizer = mixture.reference({name: one for name, one in named.items() if one.requires_grad})
    swapping: list[Any] = [one for one in optimizer.optimizers if hasattr(one, "train")]
    for one in swapping:
        one.train()
    history = []
    for step in range(STEPS):
        for name, gradient in gradients(CASE, model, step).items():
            named[name].grad = gradient
        optimizer.step()
        history.append({name: parameter.detach().clone() for name, parameter in named.items()})
    for one in swapping:
        one.eval()
    return [*history, {name: parameter.detach().clone() for name, parameter in named.items()}]


def build(mixture: Mixture, model: nn.Module, **options: Any) -> dist_optim.DistributedOptimizer:
    return dist_optim.build_optimizer(model, mixture.name, params=mixture.params, lr=1e-2, print_audit=False, **options)


def run_mixture(mixture: str, placement: str, **options: Any) -> list[str]:
    """The body: equal after every step, through a second life in the middle, and with the averaged weights."""
    chosen = MIXTURES[mixture]
    expected = reference_run(chosen)
    model = place(make_model(CASE), placement)
    optimizer = build(chosen, model, **options)
    optimizer.train()
    problems: list[str] = []
    for step in range(STEPS):
        if step == STEPS // 2:
            model, optimizer = second_life(chosen, placement, model, optimizer)
        inject(model, gradients(CASE, make_model(CASE), step))
        optimizer.step()
        problems += differences(expected[step], model, f"{placement}, step {step}")
    optimizer.eval()
    return problems + differences(expected[-1], model, f"{placement}, evaluated")


def second_life(
    mixture: Mixture, placement: str, first: nn.Module, optimizer: dist_optim.DistributedOptimizer
) -> tuple[nn.Module, dist_optim.DistributedOptimizer]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    model = place(make_model(CASE), placement)
    with torch.no_grad():
        for old, new in zip(first.parameters(), model.parameters(), strict=True):
            new.copy_(old)
    resumed = build(mixture, model)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return model, resumed


def differences(expected: dict[str, Tensor], model: nn.Module, when: str) -> list[str]:
    found = full_parameters(model)
    return [f"{when}: {name} differs" for name, one in expected.items() if not torch.equal(one, found[name])][:3]


def every_placement(mixture: str) -> None:
    problems = []
    for placement in ("none", "ddp", "fsdp2", "fsdp2 units", "fsdp1"):
        problems += run_mixture(mixture, placement)
    assert_no_problems_on_any_rank(problems)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_equals_the_separate_optimizers_on_two_ranks(mixture: str, two_ranks: RankPool) -> None:
    two_ranks.run(every_placement, mixture)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_equals_the_separate_optimizers_in_one_process(mixture: str) -> None:
    assert run_mixture(mixture, "none") == []


def test_control_other_optimizers_are_seen() -> None:
    expected = reference_run(MIXTURES["with ghosts"])
    model = make_model(CASE)
    optimizer = build(MIXTURES["three kinds"], model)
    inject(model, gradients(CASE, model, 0))
    optimizer.step()
    assert differences(expected[0], model, "step 0")


# What each parameter is stepped by ----------------------------------------------------------------------------------


def names_of(model: nn.Module, wanted: str, **options: Any) -> set[str]:
    optimizer = dist_optim.build_optimizer(model, "muon", print_audit=False, **options)
    groups = zip(optimizer.param_groups, optimizer.holdings.names_by_group(), strict=True)
    return {name for group, names in groups if group["optim"] == wanted for name in names}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.tokens = nn.Embedding(11, 6)
        self.tokens.weight = self.lm_head.weight
        self.pos_embed = nn.Parameter(torch.zeros(7, 6))
        self.inner = nn.Linear(6, 6)


def hidden_of(model: nn.Module) -> set[str]:
    return hidden_matrices(model, detect(model))


def test_hidden_matrices_are_what_is_left_without_embeddings_head_and_vectors() -> None:
    assert hidden_of(Tied()) == {"inner.weight"}
    llama = {name for name, _ in make_llama().named_parameters() if "proj" in name}
    assert hidden_of(make_llama()) == llama and len(llama) == 14
    assert {name.removeprefix("model.") for name in llama} == hidden_of(make_llama().model)  # type: ignore[arg-type]
    assert hidden_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))) == {"0.weight"}
    assert hidden_of(nn.Linear(3, 4)) == {"weight"}


def hidden_under(placement: str) -> set[str]:
    return hidden_of(place(make_llama(), placement))


def test_hidden_matrices_are_the_same_under_every_engine(two_ranks: RankPool) -> None:
    plain = hidden_of(make_llama())
    for placement in ("ddp", "fsdp1", "fsdp2 units"):
        assert two_ranks.run(hidden_under, placement) == [plain, plain]


def test_heads_go_by_their_usual_names_and_gpt2_has_matrices_of_its_own() -> None:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    bert = hidden_of(BertForSequenceClassification(BertConfig(vocab_size=11, **small)))
    assert "classifier.weight" not in bert and "bert.pooler.dense.weight" in bert
    assert not [name for name in bert if "embeddings" in name]
    gpt2 = hidden_of(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=7, n_embd=8, n_layer=1, n_head=2)))
    assert {name.rpartition("0.")[2] for name in gpt2} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


def test_the_rest_has_the_same_rate_the_decay_that_was_set_and_what_is_said_of_it() -> None:
    optimizer = dist_optim.build_optimizer(
        Tied(), "muon", lr=3e-2, weight_decay=0.2, no_decay=["inner.bias"], print_audit=False
    )
    found = [(group["optim"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [("muon", 3e-2, 0.2), ("adamw_torch", 3e-2, 0.2), ("adamw_torch", 3e-2, 0.0)]
    audit = optimizer.route_audit()
    assert "muon+adamw_torch" in audit and "group 1 (adamw_torch, full rank, lr 0.03, weight decay 0.2)" in audit
    optimizer = dist_optim.build_optimizer(
        Tied(), "muon", lr=3e-2, rest="sgd", rest_options={"lr": 0.5, "momentum": 0.9}, print_audit=False
    )
    muon, rest = optimizer.param_groups
    assert (muon["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert (rest["optim"], rest["lr"], rest["momentum"]) == ("sgd", 0.5, 0.9)


def test_an_algorithm_that_couples_tensors_is_stepped_by_one_rank_with_the_others(two_ranks: RankPool) -> None:
    assert two_ranks.run(owners_of_mixture, "with sums") == [{0}, {0}]
    assert two_ranks.run(owners_of_mixture, "three kinds") == [{0, 1}, {0, 1}]


def owners_of_mixture(mixture: str) -> set[int]:
    optimizer = build(MIXTURES[mixture], place(make_model(CASE), "ddp"))
    return set(optimizer.plan.owners.values())


def test_muon_alone_is_muon_where_nothing_is_left() -> None:
    model = Tied()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "inner.weight")
    optimizer = dist_optim.build_optimizer(model, "muon", print_audit=False)
    assert optimizer.spec.name == "muon" and "optim" not in optimizer.param_groups[0]


def test_rest_takes_what_any_other_algorithm_is_refused() -> None:
    model = Tied()
    given = {"params": list(model.parameters()), "rest": "sgd"}
    assert names_of(model, "sgd", **given) == {"lm_head.weight", "pos_embed", "inner.bias"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rest": "muon"}, ParameterError, "rest='muon' is the optimizer itself"),
        ({"rest_options": {"momentum": 0.9}}, HyperparameterError, "adamw_torch has no hyperparameter 'momentum'"),
        ({"params": [{"params": "*", "optim": "sgd"}]}, ParameterError, "muon would step nothing: sgd steps all"),
        ({"params": [{"params": "*", "optim": "muon"}]}, UnsupportedError, "'pos_embed'|'inner.bias'"),
        ({"params": [{"params": "inner.weight"}, {"params": "*", "optim": "lomo"}]}, UnsupportedError, "lomo is made"),
        (
            {"params": [{"params": "inner.*", "optim": "adamw_torch"}, {"params": "*", "optim": torch.optim.AdamW}]},
            ParameterError,
            "by its name and as a class",
        ),
        ({"fused_backward": True}, UnsupportedError, "muon cannot step inside backward"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dist_optim.build_optimizer(Tied(), "muon", print_audit=False, **options)


def test_several_algorithms_do_not_step_inside_backward() -> None:
    groups = [{"params": "inner.*"}, {"params": "*", "optim": "sgd"}]
    with pytest.raises(UnsupportedError, match="inside backward one algorithm steps all parameters"):
        dist_optim.build_optimizer(Tied(), "adamw_torch", params=groups, fused_backward=True, print_audit=False)


def test_a_bound_on_all_gradients_is_refused_inside_backward_and_served_after_it() -> None:
    options: dict[str, Any] = {"max_grad_norm": 1.0, "print_audit": False}
    with pytest.raises(UnsupportedError, match="adan needs all gradients before its first update"):
        dist_optim.build_optimizer(Tied(), "adan", fused_backward=True, **options)
    assert dist_optim.build_optimizer(Tied(), "adan", **options).spec.is_coupled
    assert not dist_optim.build_optimizer(Tied(), "adan", print_audit=False).spec.is_coupled


def test_a_group_stays_with_its_algorithm() -> None:
    model = Tied()
    optimizer = dist_optim.build_optimizer(model, "muon", print_audit=False)
    model.inner.weight.grad = torch.ones(6, 6)
    optimizer.param_groups[0]["optim"] = "adamw_torch"
    with pytest.raises(HyperparameterError, match=r"param_groups\[0\]\['optim'\] = 'adamw_torch'"):
        optimizer.step()
    optimizer.param_groups[0]["optim"] = "muon"
    optimizer.param_groups[1]["betas"] = (0.9, 1.5)
    with pytest.raises(HyperparameterError, match="'betas'"):
        optimizer.step()


def test_state_of_other_algorithms_is_refused_and_changes_nothing() -> None:
    halves = [{"params": "inner.*"}, {"params": "*", "optim": "sgd"}]
    first = dist_optim.build_optimizer(Tied(), "adamw_torch", params=halves, print_audit=False)
    crossed = [{"params": "inner.*", "optim": "sgd"}, {"params": "*"}]
    second = dist_optim.build_optimizer(Tied(), "adamw_torch", params=crossed, print_audit=False)
    saved = first.state_dict()
    with pytest.raises(StateDictError, match=r"sgd\+adamw_torch|adamw_torch\+sgd"):
        second.load_state_dict(saved)
    with pytest.raises(StateDictError, match="Group 0 of the state dict is of optim 'adamw_torch'"):
        second.load_state_dict({**saved, "optimizer": second.spec.name})
    assert second.num_steps == 0


# Doors --------------------------------------------------------------------------------------------------------------


class Separate(zero.Reference):
    """torch's own Muon and AdamW, one after the other."""

    def __init__(self, run: ZeroRun) -> None:
        super().__init__(run)
        named = dict(self.model.named_parameters())
        hidden = [named[name] for name in named if "proj" in name]
        others = [named[name] for name in named if "proj" not in name]
        self.optimizer = Together(  # type: ignore[assignment]
            torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(others, lr=2e-3, weight_decay=0.0)
        )
        self.optimizer.zero_grad = self.model.zero_grad  # type: ignore[method-assign]


def gap_under_zero(stage: int, options: dict[str, Any]) -> float:
    """The body: the largest difference of any weight from the separate optimizers, given the engine's gradients."""
    run = ZeroRun("dist_optim.muon", options, stage, real_batches=True, make_model=make_llama)
    reference = Separate(ZeroRun("muon", {"rest_options": {"lr": 2e-3}, "lr": 1e-2}, stage, make_model=make_llama))
    engine = zero.engine_of(run)
    recorder, gap = zero.Recorder(engine), 0.0
    for step in range(STEPS):
        zero.train_engine(engine, run, range(step, step + 1))
        reference.follow(recorder.gradients)
        pairs = zip(zero.weights_of(engine, run), reference.weights(), strict=True)
        gap = max(gap, *((ours - theirs).abs().max().item() for ours, theirs in pairs))
    return gap


PATTERNS = [{"params": "*proj*", "optim": "muon"}, {"params": "*", "optim": "adamw_torch", "lr": 2e-3}]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "options"),
    [(2, {"lr": 1e-2, "rest_options": {"lr": 2e-3}}), (3, {"lr": 1e-2, "params": PATTERNS})],
    ids=["stage 2, rest", "stage 3, patterns"],
)
def test_deepspeeds_json_asks_for_several(stage: int, options: dict[str, Any], two_ranks: RankPool) -> None:
    assert two_ranks.run(gap_under_zero, stage, options) == [0.0, 0.0]
