#!/usr/bin/env bash
# One vLLM server on this machine, for `itprune serve --engine vllm` on this or another one.
#
#   launch/vllm/node.sh FOLDER [options of vllm serve]
#   HOST=10.0.0.5 PORT=8001 launch/vllm/node.sh FOLDER --tensor-parallel-size 4
#
# FOLDER is what `itprune export --to vllm` wrote. VLLM_ENV names vLLM's virtual environment. Rows made
# elsewhere are for callers you trust: let only the machine in front reach HOST and PORT.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 FOLDER [options of vllm serve]" >&2
  exit 2
fi
if [[ ! -f "$1/config.json" ]]; then
  echo "error: $1 holds no model; itprune export CHECKPOINT --to vllm writes one" >&2
  exit 2
fi
if [[ -n "${VLLM_ENV:-}" ]]; then
  PATH="${VLLM_ENV}/bin:${PATH}"
fi
exec vllm serve "$1" --served-model-name "$(basename "$1")" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
  --enable-prompt-embeds --enable-mm-embeds "${@:2}"
