#!/usr/bin/env bash
# A run of several nodes through the deepspeed launcher, which srun starts once on every node.
#
#   sbatch launch/slurm/deepspeed.sh configs/lora_pruned.yaml [section.key=value ...]
#   ITPRUNE_DRY_RUN=1 sbatch ...    prints every node's command instead of running it
#
# Set nodes, GPUs and time to your cluster; ITPRUNE_ENV names a virtual environment to activate. Two
# minutes before the time is up the run writes a checkpoint; submit it again and it goes on.
#SBATCH --job-name=itprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch $0 CONFIG [section.key=value ...]" >&2
  exit 2
fi
# SLURM runs a copy of this file: the project is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
if [[ ! -f launch/train.py ]]; then
  echo "error: ${SLURM_SUBMIT_DIR} holds no launch/train.py; call sbatch from the project" >&2
  exit 2
fi
if [[ -n "${ITPRUNE_ENV:-}" ]]; then
  # shellcheck disable=SC1091
  source "${ITPRUNE_ENV}/bin/activate"
fi

nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?no list of nodes}")
master=$(head -n 1 <<< "${nodes}")
port=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:?no GPUs; see --gpus-per-node}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# All nodes with their GPUs. Without ssh (--no_ssh) a launcher starts the processes of its own node.
hostfile=$(mktemp "${SLURM_SUBMIT_DIR}/.hostfile.XXXXXX")
trap 'rm -f "${hostfile}"' EXIT
while read -r node; do
  echo "${node} slots=${gpus}"
done <<< "${nodes}" > "${hostfile}"

# A node's rank is known on the node only.
# shellcheck disable=SC2016
on_node='
command=("$1" --node_rank "${SLURM_NODEID}" "${@:2}")
if [[ -n "${ITPRUNE_DRY_RUN:-}" ]]; then echo "${command[*]}"; else exec "${command[@]}"; fi
'
srun --kill-on-bad-exit=1 bash -c "${on_node}" node \
  deepspeed --no_ssh --hostfile "${hostfile}" --master_addr "${master}" --master_port "${port}" \
  launch/train.py "$@"
