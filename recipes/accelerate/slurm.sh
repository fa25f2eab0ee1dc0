#!/bin/bash
# A run under Slurm that goes on by itself after each time limit or pre-emption:
#   sbatch recipes/accelerate/slurm.sh dic-xl-urepa --set data.path=/data/imagenet256
# One task for each GPU, without a launcher between Slurm and the training process, so that the signal reaches it: five
# minutes before the end it saves a checkpoint and exits with code 75, and the job is put back into the queue.
#SBATCH --job-name=dic-repa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

recipe=$1
run=runs/$(basename "$recipe" .yaml)
shift
resume=()
[ -f "$run/recipe.yaml" ] && resume=(--resume)

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} OMP_NUM_THREADS=1
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer takes it over from sbatch, and one core would feed a GPU
# For FSDP2 instead of data parallel: --set train.sharding=fsdp2
launch='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python -m dic_repa train "$@"'
srun --kill-on-bad-exit=0 bash -c "$launch" dic-repa \
    "$recipe" --out "$run" "${resume[@]}" "$@"
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
