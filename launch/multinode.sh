#!/usr/bin/env bash
# Train on several machines with torchrun. Run the same line on every machine, in the same folder of a shared disk:
#
#   NNODES=2 NPROC_PER_NODE=8 RDZV_ENDPOINT=node0:29400 RDZV_ID=job1 launch/multinode.sh \
#       --optim galore_adamw --optim_target_modules all-linear --bf16 --save_steps 100 --output_dir runs/job1
#
# The machines find each other and agree on their ranks (c10d rendezvous): nobody counts machines by hand. When a worker
# dies, every machine's agent starts its workers again, MAX_RESTARTS times at most, and they go on from the last
# checkpoint in --output_dir: `--resume_from_checkpoint last` is added here.
#
#   NNODES          machines, or MIN:MAX for a job that goes on with those that are left (default 1)
#   NPROC_PER_NODE  ranks on this machine (default: gpu, one for each)
#   RDZV_ENDPOINT   HOST:PORT of any one of the machines, the same everywhere (default localhost:29400)
#   RDZV_ID         a name that all machines of this job share, and no other job has (default dist_optim)
#   MAX_RESTARTS    how often workers may be started again (default 3)
#   LOCAL_ADDR      this machine's address as the others reach it, where its host name does not resolve
#   DIST_OPTIM_RANK_TIMEOUT_S   seconds until a silent rank or machine is given up (default 120; 0: never)
#   SCRIPT          what to run in place of train.py; it must know --resume_from_checkpoint
#
# Plain torchrun trains DDP. The fields of configs/accelerate/ stand in the environment for another strategy:
#   ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP   (fsdp2.yaml)
# DeepSpeed is train.py's flag: --deepspeed configs/deepspeed/zero2.json
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# train.py imports dist_optim, which need not be installed where the repository itself is there.
export PYTHONPATH="${here%/launch}${PYTHONPATH:+:$PYTHONPATH}"
# A fresh store at every start of the workers. torch 2.13 otherwise keeps the agents' own, under a number that counts
# failures: the agent of a dead worker counts one, an agent that only follows counts none, and their workers never meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

options=(
    --nnodes "${NNODES:-1}"
    --nproc-per-node "${NPROC_PER_NODE:-gpu}"
    --rdzv-backend c10d
    --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:29400}"
    --rdzv-id "${RDZV_ID:-dist_optim}"
    --max-restarts "${MAX_RESTARTS:-3}"
)
if [[ -n "${LOCAL_ADDR:-}" ]]; then
    options+=(--local-addr "$LOCAL_ADDR")
fi

exec python "$here/agent.py" "${options[@]}" "${SCRIPT:-$here/train.py}" --resume_from_checkpoint last "$@"
