"""Stock DeepSpeed with one of our names in its JSON. On GPUs, and on two CPU ranks where there are none:

torchrun --nproc_per_node 2 launch/examples/deepspeed_engine.py
"""

# ruff: noqa: E402
from dist_optim.integrations.quiet import quieten_libraries

quieten_libraries()  # their warnings of kernels and accelerators that are not there; leave it out at will

import torch

import dist_optim
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.deepspeed import register
from dist_optim.planning import shipped

if not torch.accelerator.is_available():
    cpu_rehearsal.choose_cpu_for_deepspeed()  # before DeepSpeed is imported
import deepspeed
from transformers import AutoConfig, AutoModelForCausalLM

register()  # from here on "type": "galore_adamw" is known to DeepSpeed
configs = shipped.root() / "configs"
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configs / "models/llama_tiny.json"))
engine, optimizer, _, _ = deepspeed.initialize(model=model, config=str(configs / "deepspeed/galore_adamw_zero2.json"))

for step in range(10):
    torch.manual_seed(step * engine.world_size + engine.global_rank)
    # Rows that count up in ones, twos or threes.
    starts = torch.randint(256, (engine.train_micro_batch_size_per_gpu(), 1), device=engine.device)
    batch = (starts + (1 + starts % 3) * torch.arange(64, device=engine.device)) % 256
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step}: loss {loss.item():.3f}")
# Loads under any strategy and number of ranks; engine.save_checkpoint writes DeepSpeed's own files.
dist_optim.save_checkpoint("runs/deepspeed_engine", engine, engine.optimizer)
engine.destroy()
torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
