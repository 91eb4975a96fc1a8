#!/usr/bin/env bash
# Slurm starts one launcher a node, and that the ranks: failures are told with their cause, a lost node is noticed
# after --node-timeout, and the run goes on with the nodes that are left. Submit with: sbatch slurm_launch.sh
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --signal=TERM@120
set -euo pipefail

first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 10000))

# Two nodes are enough to go on. For a fixed number of nodes write --nnodes "$SLURM_NNODES", and for nodes in Slurm's
# order --node-rank "$SLURM_NODEID" --master-addr "$first" --master-port "$port" (in a bash -c that srun runs, for
# every node has its own SLURM_NODEID) instead of --rdzv-endpoint and --max-restarts.
srun --kill-on-bad-exit=0 --no-kill --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    python -m lightlite.launch --gpus 8 --nnodes "2:$SLURM_NNODES" --max-restarts 3 \
    --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" --node-timeout 30 train.py
