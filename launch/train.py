"""Train a causal language model with a registered optimizer, on however many ranks the launcher starts.

    accelerate launch --config_file configs/accelerate/ddp_cpu_2.yaml launch/train.py --optim galore_adamw \
        --optim_target_modules attn mlp --optim_args "rank=32, update_proj_gap=50" --output_dir runs/mine

Run by path. Reading order of its siblings: `train_job` (from arguments to a finished run), `train_arguments`,
`train_data`, `train_model`, `train_loop`, `train_schedule`, `train_checkpoints`, `train_report`, `train_signals`.

A mistake of the user ends all ranks with exit code 2 before training, SIGINT with 130, SIGTERM with 143.
"""

import sys

from train_signals import SignalWatch

if __name__ == "__main__":
    watch = SignalWatch()
    from train_job import main  # seconds of imports, in which Ctrl-C is as likely as later

    main(sys.argv[1:], watch)
