#!/usr/bin/env bash
# Slurm starts every rank itself: one task a GPU. Submit with: sbatch slurm_srun.sh
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# Two minutes before the time is up the ranks get SIGTERM, and save a checkpoint if the Trainer is asked to.
#SBATCH --signal=TERM@120
set -euo pipefail

# Every task must see all GPUs of its node (no --gpus-per-task): rank and GPU are matched by SLURM_LOCALID.
# Tasks meet on the step's first host, at a port that is made from the job's id; MASTER_ADDR and MASTER_PORT override.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" python train.py
