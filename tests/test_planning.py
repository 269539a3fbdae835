"""``dist_optim.planning``: plans follow from upstream's own class, the real planner and the engines' cuts."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from mesh_doors import make_moe
from torch import nn
from typer.testing import CliRunner, Result

import dist_optim
from dist_optim.cli import app
from dist_optim.errors import HyperparameterError, UnsupportedError, UsageError
from dist_optim.planning import OFFLOADED, STRATEGIES, Forecast, PlannedModel, compare, fit, plan, read_model, shipped
from dist_optim.planning.charts import PARTS, parts_of
from dist_optim.planning.writing import Launch, accelerate_yaml, write_launch
from dist_optim.specs.catalogue import typical_state_bytes
from train_arguments import read_arguments

GIB = 1 << 30
WIDTH = 4096


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def one_matrix() -> PlannedModel:
    with torch.device("meta"):
        return read_model(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)))


@pytest.fixture(scope="module")
def llama_8b() -> PlannedModel:
    return read_model("llama_8b")


def state_of(found: Forecast) -> int:
    return found.memory["optimizer state"].max


TOLD = ["adafactor", "adalomo", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_4bit", "apollo_mini", "flash_adamw"]
TOLD += ["flash_lion", "galore_adamw", "galore_adamw_8bit", "grokadamw", "kron", "prodigy", "soap"]


@pytest.mark.parametrize("name", TOLD)
def test_upstream_keeps_what_the_registry_says(name: str, one_matrix: PlannedModel) -> None:
    """The text of each spec, written for people, against the class, stepped without data."""
    is_flash = name.startswith("flash_")  # its kernels, which run on GPUs alone, with the byte that corrects bf16
    found = plan(one_matrix, name, "one", precision="bf16" if is_flash else "fp32")
    told = (typical_state_bytes(dist_optim.get_spec(name)) or 0.0) + is_flash
    assert state_of(found) / WIDTH**2 == pytest.approx(told, rel=0.01, abs=1e-4)


def test_a_rehearsal_tells_of_scratch(one_matrix: PlannedModel) -> None:
    scratch = {name: plan(one_matrix, name, "one", precision="fp32").memory["scratch"].max for name in ("sgd", "muon")}
    assert scratch["sgd"] == 0
    assert 2 * 4 * WIDTH**2 <= scratch["muon"] <= 16 * 4 * WIDTH**2, "products of matrices as large as the tensor"


class NeedsValues(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["params"][0].detach().numpy()


def test_a_class_that_needs_values_is_refused_with_what_to_do(one_matrix: PlannedModel) -> None:
    with pytest.raises(UnsupportedError, match="needs values.*optimizer_state_bytes"):
        plan(one_matrix, NeedsValues, "one", lr=0.1)


@pytest.mark.parametrize("name", ["galore_adamw", "muon", "adamw_torch"])
def test_state_of_all_ranks_is_that_of_one(llama_8b: PlannedModel, name: str) -> None:
    """Owners and slices alike: nothing is lost at the cuts, nothing is kept twice."""
    alone = plan(llama_8b, name, "one")
    total = alone.memory["optimizer state"].max
    for strategy in ("ddp", "fsdp1", "fsdp2", "zero3"):
        found = plan(llama_8b, name, strategy, 64)
        state = found.memory["optimizer state"]
        assert state.mean * 64 == pytest.approx(total, rel=1e-4), strategy
        assert state.max >= state.mean and found.peak.max >= found.peak.mean


def test_what_is_sent_is_what_the_simulation_sends(llama_8b: PlannedModel) -> None:
    module = llama_8b.module.to(torch.bfloat16)
    simulated = dist_optim.simulate(module, "muon", 64, lr=1e-3)
    found = plan(llama_8b, "muon", "fsdp2", 64, precision="bf16", lr=1e-3)
    ours = sum(nbytes for phase, nbytes in found.wire.items() if "owners" in phase or "back" in phase.split())
    assert ours <= simulated.sent_bytes * 1.01 and ours > simulated.sent_bytes / 3
    assert found.num_rounds == simulated.num_rounds
    assert found.owned_imbalance == pytest.approx(simulated.owned_imbalance)
    assert found.optimizer_s == pytest.approx(simulated.step_s, rel=0.05)


def test_a_large_job_is_planned_under_every_strategy() -> None:
    """Llama-70B on 4,096 ranks; a second each."""
    model = read_model("llama_70b")
    found, refused = compare(model, ["galore_adamw"], ("fsdp2", "hsdp", "zero1", "zero3"), 4096)
    by_name = {one.strategy: one for one in found}
    assert not refused and len(by_name) == 4
    assert not by_name["zero1"].fits and by_name["zero3"].memory["weights"].max < GIB
    for strategy in ("fsdp2", "hsdp"):
        assert by_name[strategy].owned_imbalance > 10, "there are more ranks than matrices"
    assert by_name["hsdp"].wire["backward: all-reduce of replicas"]
    assert by_name["fsdp2"].refresh_s > 0


def test_a_class_without_a_name_is_planned_too(one_matrix: PlannedModel) -> None:
    found = plan(one_matrix, torch.optim.NAdam, "fsdp2", 2, precision="fp32", lr=0.1)
    assert state_of(found) == pytest.approx(8 * WIDTH**2, rel=1e-3), "one rank owns the only matrix"
    assert found.optimizer == "NAdam" and "independent" in found.notes[0]


def test_stacks_stay_whole_where_the_job_leaves_them_whole() -> None:
    """GaLore keeps a projection of each matrix, so that its state tells which tensors are matrices to it."""
    model = read_model(make_moe())
    split, inside = (
        state_of(plan(model, name, strategy, 1, precision="fp32", device="cpu", rank=4))
        for name, strategy in (("galore_adamw", "one"), ("galore_adamw_layerwise", "one"))
    )
    assert split < inside


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", lr=0.1, print_audit=False)
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    dist_optim.save_checkpoint(tmp_path / "saved", model, optimizer)
    written = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file())
    found = plan(model, "adamw_torch", "one", precision="fp32")
    assert found.checkpoint_bytes == pytest.approx(written, rel=0.05)


def test_what_is_inside_backward_stores_no_gradients(llama_8b: PlannedModel) -> None:
    assert plan(llama_8b, "lomo", "fsdp2", 8).memory["gradients"].max == 0
    assert plan(llama_8b, "lomo", "fsdp2", 8, fused_backward=False).memory["gradients"].max > 0
    with pytest.raises(UnsupportedError, match="Use galore_adamw"):
        plan(llama_8b, "galore_adamw_layerwise", "zero3", 8)


def test_replicated_state_is_on_every_rank(llama_8b: PlannedModel) -> None:
    alone = plan(llama_8b, "adamw_torch", "one")
    found = plan(llama_8b, "adamw_torch", "ddp", 8, replicate="elementwise")
    assert found.memory["optimizer state"].mean == pytest.approx(state_of(alone), rel=1e-4)
    assert not any(phase.startswith("step") for phase in found.wire) and not found.num_rounds


def test_masters_are_with_who_steps(llama_8b: PlannedModel) -> None:
    plain = plan(llama_8b, "muon", "fsdp2", 8, precision="bf16")
    kept = plan(llama_8b, "muon", "fsdp2", 8, precision="bf16", master_weights=True)
    assert plain.memory["masters"].max == 0
    assert kept.memory["masters"].mean == pytest.approx(4 * llama_8b.numel / 8, rel=1e-6)
    assert state_of(kept) == pytest.approx(2 * state_of(plain), rel=1e-3), "and their state is in fp32"


def test_activations_grow_as_they_should() -> None:
    model = read_model("llama_tiny")

    def kept(batch: int, **options: Any) -> int:
        return plan(model, "sgd", "one", batch=batch, length=256, **options).memory["activations"].max

    assert kept(0) == 0
    assert kept(4) == pytest.approx(2 * kept(2), rel=0.05)
    assert kept(4, gradient_checkpointing=True) < kept(4)
    assert kept(4, precision="fp32") > 1.5 * kept(4)


def test_the_estimate_of_activations_is_what_autograd_saves() -> None:
    """On CPU, in one process, really run."""
    model = read_model("llama_tiny")
    planned = plan(model, "sgd", "one", batch=2, length=64, precision="fp32").memory["activations"].max
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM(model.config)
    own = {one.untyped_storage().data_ptr() for one in (*real.parameters(), *real.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros((2, 64), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        real(input_ids=tokens, labels=tokens, use_cache=False)
    measured = sum(one.untyped_storage().nbytes() for address, one in saved.items() if address not in own)
    assert planned == pytest.approx(measured, rel=0.1)  # masks are made in another way without data


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strategy": "zero9"}, "Strategies: one"),
        ({"precision": "int4"}, "mixed, fp32, bf16"),
        ({"strategy": "one", "num_ranks": 2}, "1 for 'one'"),
        ({"gpu_memory_gib": -1.0}, "not negative"),
    ],
)
def test_what_cannot_be_planned_is_refused(one_matrix: PlannedModel, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(one_matrix, "sgd", **arguments)


def test_a_plan_is_refused_where_the_job_would_be(one_matrix: PlannedModel) -> None:
    with pytest.raises(HyperparameterError, match="rank"):
        plan(one_matrix, "galore_adamw", "one", rank=-1)
    with pytest.raises(UnsupportedError, match="equal size"):
        plan(one_matrix, "sgd", "hsdp", 9, num_nodes=2)
    with pytest.raises(UnsupportedError, match="need CUDA"):
        plan(one_matrix, "flash_adamw", "one", device="cpu", precision="bf16")


# What fits, and what launches it --------------------------------------------------------------------------------------

NAMES = ("adamw_torch", "galore_adamw", "lomo")


def test_what_fits_is_in_order_and_nothing_is_lost() -> None:
    model = read_model("llama_1b")
    options: dict[str, Any] = {"optimizers": NAMES, "gpu_memory_gib": 20.0, "batch": 1, "length": 512}
    found = fit(model, 2, **options)
    pairs = [(one.optimizer, one.strategy) for one in (*found.fitting, *found.too_large)]
    on_gpu = [pair for pair in (*pairs, *(tuple(key.split(", ")) for key in found.refused)) if pair[1] in STRATEGIES]
    assert len(set(on_gpu)) == len(NAMES) * 5
    served = {one.optimizer for one in found.fitting if one.strategy in STRATEGIES}
    assert {name for name, strategy in pairs if strategy in OFFLOADED}.isdisjoint(served)
    assert all(one.fits for one in found.fitting) and not any(one.fits for one in found.too_large)
    assert found.fitting and found.too_large, "or one of the two shows nothing"
    times = [one.step_s or 0.0 for one in found.fitting]
    assert times == sorted(times)
    left = [one.headroom for one in fit(model, 2, order="headroom", **options).fitting]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize(("offloaded", "engine"), OFFLOADED.items())
def test_what_is_offloaded_leaves_the_gpu_for_the_host(llama_8b: PlannedModel, offloaded: str, engine: str) -> None:
    on_gpu, found = (plan(llama_8b, "adamw_torch", one, 8, batch=1, length=512) for one in (engine, offloaded))
    for part in ("masters", "optimizer state"):
        assert found.host[part] == on_gpu.memory[part] and found.memory[part].max == 0
    assert ("weights" in found.host) == (engine == "fsdp2")
    left = sum(found.memory[part].max for part in ("weights", "engine buffers", "activations"))
    assert found.peak.max == left < on_gpu.peak.max
    assert found.checkpoint_bytes == on_gpu.checkpoint_bytes and found.optimizer_s > on_gpu.optimizer_s
    assert sum(nbytes for phase, nbytes in found.wire.items() if "the host" in phase) > 0


def test_for_a_name_that_fits_nowhere_the_host_is_asked() -> None:
    options: dict[str, Any] = {"gpu_memory_gib": 24.0, "batch": 1, "length": 512}
    found = fit(read_model("llama_3b"), 2, optimizers=["adamw_torch", "lomo"], **options)
    by_name = {
        name: {one.strategy for one in found.fitting if one.optimizer == name} for name in ("adamw_torch", "lomo")
    }
    assert by_name["adamw_torch"] and by_name["adamw_torch"] <= {*OFFLOADED}
    assert by_name["lomo"] and by_name["lomo"].isdisjoint(OFFLOADED)


@pytest.mark.parametrize(
    ("strategy", "nodes"),
    [(one, nodes) for one in (*STRATEGIES, *OFFLOADED) for nodes in (1, 2) if one != "one" or nodes == 1],
)
def test_what_is_written_loads(strategy: str, nodes: int, tmp_path: Path) -> None:
    ranks = 1 if strategy == "one" else 8 * nodes
    model = read_model("llama_tiny")
    found = plan(model, "galore_adamw", strategy, ranks, num_nodes=nodes, target_modules=["attn", "mlp"], rank=8)
    launch = Launch(model="llama_tiny", batch=2, length=64, target_modules=("attn", "mlp"), optim_args="rank=8")
    files = {path.name: path for path in write_launch(found, launch, tmp_path / "new")}
    config = load_config_from_file(str(files["accelerate.yaml"]))
    assert (config.num_processes, config.num_machines) == (ranks, nodes)
    line = files["launch.sh"].read_text().splitlines()[-1].removeprefix("exec accelerate launch ")
    given = [os.path.expandvars(word) for word in shlex.split(line.replace('"$@"', ""))]
    given[given.index("accelerate.yaml")] = str(files["accelerate.yaml"])
    with mock.patch.dict(os.environ, {"MACHINE_RANK": "0", "MASTER_ADDR": "node0"}):
        words = [os.path.expandvars(word) for word in given]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        asked = read_arguments(arguments.training_script_args)
    assert arguments.training_script == "train.py" and asked.optim == "galore_adamw"
    assert (asked.block_size, asked.bf16) == (64, True)
    assert arguments.use_deepspeed == strategy.startswith("zero") and arguments.use_fsdp == ("sdp" in strategy)
    if strategy.startswith("zero"):
        _load_as_deepspeed(files["deepspeed.json"], int(strategy.removesuffix("_offload")[-1]))
    with pytest.raises(UsageError, match="Name another folder"):
        write_launch(found, launch, tmp_path / "new")


def _load_as_deepspeed(path: Path, stage: int) -> None:
    """With what the script fills in for "auto"."""
    from deepspeed.runtime.config import DeepSpeedConfig

    text = re.sub(r'"(train_micro_\w+|gradient_accumulation\w+)": "auto"', r'"\1": 1', path.read_text())
    values = json.loads(
        text.replace('"gradient_clipping": "auto"', '"gradient_clipping": 1.0').replace('"auto"', "true")
    )
    read = DeepSpeedConfig(values, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: 8))
    assert read.zero_config.stage == stage and read.gradient_clipping == 1.0


def test_the_yaml_is_the_packaged_one_but_for_its_numbers() -> None:
    found = plan(read_model("llama_tiny"), "sgd", "hsdp", 32, num_nodes=4, precision="fp32")
    source = (shipped.root() / "configs/accelerate/hsdp.yaml").read_text().splitlines()
    changed = [line.strip() for line in accelerate_yaml(found).splitlines()[1:] if line not in source]
    assert changed == [
        "num_machines: 4",
        "num_processes: 32",
        'mixed_precision: "no"',
        "parallelism_config_dp_replicate_size: 4",
        "parallelism_config_dp_shard_size: 8",
    ]


# The command line -----------------------------------------------------------------------------------------------------


def test_plan_prints_and_says_by_its_code_whether_it_fits(tmp_path: Path) -> None:
    arguments = ["plan", "--model", "llama_8b", "--optim", "galore_adamw", "--strategy", "fsdp2", "--ranks", "8"]
    done = run(*arguments, "--optim_args", "rank=64", "--target_modules", "attn,mlp")
    assert done.exit_code == 0, done.output
    assert "Fits" in done.output and "optimizer state" in done.output and "note:" not in done.output
    small = run(*arguments, "--gpu-memory", "8", "--json")
    assert small.exit_code == 1
    read = json.loads(small.stdout)
    assert not read["fits"] and read["memory"]["weights"]["max"] > GIB


def test_compare_has_a_line_each_and_a_chart(tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    arguments = ["plan", "--model", "llama_tiny", "--ranks", "2", "--strategy", "fsdp2", "--chart", str(chart)]
    done = run(*arguments, "--compare", "optimizers", "--optim", "adamw_torch,flash_adamw,lomo")
    assert done.exit_code == 0, done.output
    lines = [line.split()[0] for line in done.output.splitlines() if line[:1].isalpha()]
    assert lines[:3] == ["GiB", "adamw_torch", "lomo"] and "refused: flash_adamw" in done.output
    assert max(map(len, done.output.splitlines()[:3])) <= 80
    drawn = chart.read_bytes()
    run(*arguments, "--compare", "optimizers", "--optim", "adamw_torch,flash_adamw,lomo")
    assert drawn.startswith(b"<?xml") and chart.read_bytes() == drawn, "the same plans give the same bytes"
    many = run("plan", "--model", "llama_tiny", "--ranks", "2", "--optim", "sgd", "--compare", "strategies")
    assert [name for name in STRATEGIES[1:] if f"\n{name} " not in many.output] == []


def test_a_chart_shows_the_whole_peak() -> None:
    found = plan(read_model("llama_tiny"), "adamw_torch", "fsdp2", 2, batch=1, length=64)
    assert sum(parts_of(found)) == pytest.approx(found.peak.max / GIB) and len(parts_of(found)) == len(PARTS)


def test_fit_writes_what_it_finds(tmp_path: Path) -> None:
    names = ",".join(NAMES)
    arguments = ["plan", "--model", "llama_tiny", "--ranks", "2", "--gpu-memory", "24", "--optim", names, "--fit"]
    done = run(*arguments, "--top", "2", "--write", str(tmp_path / "plans"))
    assert done.exit_code == 0, done.output
    folders = sorted(path.name for path in (tmp_path / "plans").iterdir())
    assert len(folders) == 2 and folders[0].startswith("1_") and folders[1].startswith("2_")
    nothing = run(*arguments, "--gpu-memory", "0.001")
    assert nothing.exit_code == 1 and "Nearest" in nothing.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no_such_model"], "dist-optim ls models"),
        (["--model", "no/such/config.json"], "cannot be read"),
        (["--model", "llama_tiny"], "Give one --optim"),
        (["--model", "llama_tiny", "--optim", "galor"], "nearest names"),
        (["--model", "llama_tiny", "--optim", "sgd", "--compare", "both"], "optimizers or strategies"),
        (["--model", "llama_tiny", "--optim", "sgd", "--write", "x"], "Add --fit"),
        (["--model", "llama_tiny", "--optim", "sgd", "--strategy", "fsdp2", "--optim_args", "x"], "key=value"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str) -> None:
    done = run("plan", *arguments)
    assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.output


def test_help_has_examples() -> None:
    said = " ".join(run("plan", "--help").output.split())
    assert "--fit --write plans" in said and "Will it fit?" in said


# What is shipped ------------------------------------------------------------------------------------------------------


def test_ls_lists_every_file_and_cp_copies_it(tmp_path: Path) -> None:
    listed = json.loads(run("ls", "--json").stdout)
    assert set(listed) == set(shipped.KINDS) and "models/llama_70b.json" in run("ls", "models").stdout
    for kind, paths in listed.items():
        for path in paths:
            done = run(
                "cp", f"{kind}/{Path(path).name}", str(tmp_path / kind / Path(path).stem / Path(path).suffix[1:])
            )
            copied = tmp_path / kind / Path(path).stem / Path(path).suffix[1:] / Path(path).name
            assert done.exit_code == 0 and copied.read_bytes() == Path(path).read_bytes(), done.output


def test_cp_brings_what_train_py_imports_and_replaces_nothing(tmp_path: Path) -> None:
    assert run("cp", "train.py", str(tmp_path)).exit_code == 0
    assert {"train.py", "train_arguments.py", "train_data.py"} <= {path.name for path in tmp_path.iterdir()}
    again = run("cp", "train.py", str(tmp_path))
    assert again.exit_code == 2 and "is not replaced" in again.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("fsdp3.yaml", "nearest: .*fsdp"), ("fsdp2_offload_cpu_3", "ls"), ("zero1", "several files")]
)
def test_cp_says_what_there_is(name: str, words: str, tmp_path: Path) -> None:
    done = run("cp", name, str(tmp_path))
    assert done.exit_code == 2 and re.search(words, done.stderr, re.IGNORECASE)
