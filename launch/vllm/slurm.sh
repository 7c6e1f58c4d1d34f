#!/usr/bin/env bash
# vLLM on every node of a job, and one address before them all on the first node.
#
#   sbatch launch/vllm/slurm.sh FOLDER [options of vllm serve]
#
# ITPRUNE_ENV and VLLM_ENV name both virtual environments. Users talk to 127.0.0.1:8080 of the first
# node, through a tunnel: ssh -L 8080:127.0.0.1:8080 NODE. Nodes that come up later are joined, and one
# that fails takes no request with it. vLLM listens to the whole cluster: on one you share with others,
# ask for exclusive nodes behind a firewall.
#SBATCH --job-name=itprune-serve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch $0 FOLDER [options of vllm serve]" >&2
  exit 2
fi
# SLURM runs a copy of this file: the project is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
if [[ ! -f launch/vllm/node.sh ]]; then
  echo "error: ${SLURM_SUBMIT_DIR} holds no launch/vllm/node.sh; call sbatch from the project" >&2
  exit 2
fi
if [[ -n "${ITPRUNE_ENV:-}" ]]; then
  # shellcheck disable=SC1091
  source "${ITPRUNE_ENV}/bin/activate"
fi

port=$((20000 + SLURM_JOB_ID % 20000))
upstream=""
for node in $(scontrol show hostnames "${SLURM_JOB_NODELIST:?no list of nodes}"); do
  upstream+="${upstream:+,}http://${node}:${port}"
done

HOST=0.0.0.0 PORT=${port} srun --kill-on-bad-exit=0 launch/vllm/node.sh "$@" &
nodes=$!
trap 'kill "${nodes}" 2> /dev/null || true' EXIT
itprune serve "$1" --engine vllm --upstream "${upstream}" --port 8080
