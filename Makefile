# The two commands are `make demo` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test lint parity memory reshard faults simulate choosing bench gpu any-optimizer soak compat trainer-suite docs clean

STAMP := .venv/.stamp
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# One thread per rank: ranks that share cores slow each other down otherwise.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Some environments forbid compiled files: every rank would compile all of these again.
unexport PYTHONDONTWRITEBYTECODE

DEMO = accelerate launch --config_file configs/accelerate/ddp_cpu_2.yaml launch/train.py --use_cpu \
	--optim galore_adamw --optim_target_modules attn mlp --optim_args "rank=32, update_proj_gap=50, scale=1.0" \
	--learning_rate 2e-3 --max_steps 240 --output_dir runs/demo --overwrite_output_dir

help: ## list the targets
	@grep -E "^[a-z-]+:.*##" Makefile | sed -E "s/:.*## /\t/" | expand -t 16

demo: $(STAMP) ## train a small Llama with galore_adamw on two CPU ranks, about 3 minutes; output in runs/demo
	@printf '+ %s\n' '$(DEMO)'
	@$(DEMO)

test: lint ## every check: lint, types, tests on CPU ranks, tests under torchrun with 2 ranks
	@echo "+ pytest tests -n 2 --dist loadfile --durations 15"
	@pytest tests -n 2 --dist loadfile --durations 15
	@echo "+ torchrun --standalone --nproc_per_node 2 -m pytest tests_multigpu"
	@torchrun --standalone --nproc_per_node 2 -m pytest tests_multigpu

lint: $(STAMP) ## ruff and mypy
	@echo "+ ruff check ."
	@ruff check .
	@echo "+ mypy dist_optim launch"
	@mypy dist_optim launch
	@echo "+ mypy benchmarks; mypy tests; mypy tests_multigpu"
	@mypy benchmarks
	@mypy tests
	@MYPYPATH=tests_multigpu:tests mypy tests_multigpu

parity: $(STAMP) ## measure every optimizer under every engine; writes docs/{parity,zero,end_to_end,resume,situations}.md, README's table
	@echo "+ python tests/measure_parity.py"
	@python tests/measure_parity.py
	@echo "+ python tests/measure_zero.py"
	@python tests/measure_zero.py
	@echo "+ python tests/measure_end_to_end.py"
	@python tests/measure_end_to_end.py
	@echo "+ python tests/measure_meshes.py"
	@python tests/measure_meshes.py
	@echo "+ python tests/measure_resume.py"
	@python tests/measure_resume.py
	@echo "+ python tests/measure_situations.py"
	@python tests/measure_situations.py
	@echo "+ python tests/measure_stock.py"
	@python tests/measure_stock.py

memory: $(STAMP) ## what ranks hold beside what is planned, every name and strategy, 20 minutes; writes docs/memory.{json,md}
	@echo "+ python tests/measure_memory.py"
	@python tests/measure_memory.py

reshard: $(STAMP) ## save under every strategy, load under every other; writes docs/reshard.json and docs/checkpoints.md
	@echo "+ python tests/measure_reshard.py"
	@python tests/measure_reshard.py

faults: $(STAMP) ## kill saves, and fail their disk, at each file-system call; writes docs/faults.json and docs/checkpoints.md
	@echo "+ python tests/measure_faults.py"
	@python tests/measure_faults.py

simulate: $(STAMP) ## plan Llama-8B and 70B on up to 4,096 ranks; writes docs/simulation.{json,md}
	@echo "+ python benchmarks/simulate.py"
	@python benchmarks/simulate.py

choosing: $(STAMP) ## plan Llamas under every optimizer and strategy; writes the tables of docs/choosing.md
	@echo "+ python benchmarks/choosing.py"
	@python benchmarks/choosing.py

bench: $(STAMP) ## time and count steps beside the alternatives, about 20 minutes; writes docs/performance.{json,md}
	@echo "+ python benchmarks/steps.py"
	@python benchmarks/steps.py

gpu: $(STAMP) ## what can be shown on one GPU, in less than 10 minutes; writes docs/gpu.{json,md}
	@echo "+ python benchmarks/gpu.py"
	@python benchmarks/gpu.py

any-optimizer: $(STAMP) ## every class of torch, pytorch-optimizer, timm, heavyball, ..., as installed; writes docs/any-optimizer.md
	@echo "+ python tests/measure_any_optimizer.py"
	@TORCHDYNAMO_DISABLE=1 python tests/measure_any_optimizer.py

soak: $(STAMP) ## 2,000 steps with evaluations, saves, freezing, failures and resumes, under three engines; writes docs/soak.json
	@echo "+ python tests/measure_soak.py"
	@python tests/measure_soak.py

compat: $(STAMP) ## run a part of the tests with the oldest and newest Pythons and packages; writes docs/compat.md
	@echo "+ python tests/measure_compat.py"
	@python tests/measure_compat.py

trainer-suite: $(STAMP) ## run transformers' own Trainer tests with ours; writes docs/trainer_suite.json and docs/trainer.md
	@echo "+ python tests/measure_trainer_suite.py"
	@python tests/measure_trainer_suite.py

docs: $(STAMP) ## write the tables of docs/optimizers from the registry
	@echo "+ python tests/optimizer_pages.py"
	@PYTHONPATH=. python tests/optimizer_pages.py
	@echo "+ python tests/doctor_page.py"
	@PYTHONPATH=. python tests/doctor_page.py

clean: ## remove the environment, the caches and the runs
	rm -rf .venv .compat runs .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt .ci/environment
	@.ci/environment
