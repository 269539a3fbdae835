"""A hand-written accelerate loop. On GPUs, and rehearsed on two CPU ranks:

accelerate launch --config_file configs/accelerate/fsdp2.yaml launch/examples/accelerate_loop.py
accelerate launch --config_file configs/accelerate/fsdp2_cpu_2.yaml launch/examples/accelerate_loop.py
"""

# ruff: noqa: E402
from dist_optim.integrations.quiet import quieten_libraries

quieten_libraries()  # their warnings of kernels and accelerators that are not there; leave it out at will

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from dist_optim.integrations.accelerate import prepare
from dist_optim.planning import shipped

accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=2)
torch.manual_seed(0)  # every rank starts from the same weights
config = AutoConfig.from_pretrained(shipped.root() / "configs/models/llama_tiny.json")
model = AutoModelForCausalLM.from_config(config)
# Rows that count up in ones, twos or threes.
data = [(start + (1 + start % 3) * torch.arange(64)) % 256 for start in range(160)]
loader = accelerator.prepare(DataLoader(data, batch_size=4, shuffle=True))  # type: ignore[arg-type]  # a list will do

model, optimizer, scheduler = prepare(
    accelerator,
    model,
    "galore_adamw",
    lr=2e-3,
    target_modules="all-linear",
    rank=32,
    scheduler="linear",
    scheduler_options={"num_training_steps": 10},
)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.print(f"loss {loss.item():.3f}")
accelerator.save_state("runs/accelerate_loop")  # load_state takes it back, on any number of ranks
accelerator.end_training()
