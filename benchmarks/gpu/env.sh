# Sourced by the scripts here: the repository as the working directory, Python with Transformer Engine, and where results go.
#
# On the GPU machine: OUT is where results are fetched from; .te/ holds the wheels and their install.sh (copied from te-h100).
# DRY_RUN=1 takes PYTHON (default .venv/bin/python) as it is, on a CPU, with tiny sizes: it proves that the scripts run.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT=${OUT:-$PWD/.gpu/out} STATE=${STATE:-${TMPDIR:-/tmp}/exact-gpu} TE_SITE=${TE_SITE:-${TMPDIR:-/tmp}/te-site}
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1
mkdir -p "$OUT" "$STATE"
began=$SECONDS

if [ -n "${DRY_RUN:-}" ]; then
  PYTHON=${PYTHON:-.venv/bin/python}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=1
else
  PYTHON=python3
  if [ -e "$TE_SITE/.ok" ]; then  # installed by an earlier call to this machine
    export PYTHONPATH="$TE_SITE${PYTHONPATH:+:$PYTHONPATH}" NVTE_FRAMEWORK=pytorch
  else
    [ -e .te/install.sh ] || { echo "env.sh: .te/ is not here: copy the te-h100 folder to .te/ and name it in carry"; exit 1; }
    . .te/install.sh || exit 1
  fi
  export PYTHONPATH="$PWD:$PYTHONPATH"
  if ! [ -e "$STATE/.checked" ]; then
    "$PYTHON" - <<'PY' || exit 1
import sys

import torch
import transformer_engine
import transformer_engine.pytorch
import megatron.core

found = {"Python": "%d.%d" % sys.version_info[:2], "torch": torch.__version__, "Transformer Engine": transformer_engine.__version__,
         "megatron-core": megatron.core.__version__, "compute capability": "%d.%d" % torch.cuda.get_device_capability()}
wanted = {"Python": "3.12", "torch": "2.11.0+cu130", "Transformer Engine": "2.20.2", "megatron-core": "0.19.2",
          "compute capability": "9.0"}
wrong = {name: (value, wanted[name]) for name, value in found.items() if not value.startswith(wanted[name])}
print("env.sh:", found)
if wrong:
    sys.exit(f"env.sh: the wheels in .te are for other versions (here, wanted): {wrong}")
PY
    touch "$STATE/.checked"
  fi
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu --format=csv \
    >>"$OUT/machine.txt" 2>&1
fi

left() { echo $((${LIMIT:-530} - (SECONDS - began))); }  # seconds until the script should have ended
say() { echo "$*" | tee -a "$OUT/commands.txt"; }
# run SECONDS COMMAND...: with a time limit, its command and exit code in commands.txt, its output in log.txt; never ends the script
run() {
  local limit=$1 code
  shift
  say "\$ $*"
  timeout -k 20 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || say "exit code $code after at most $limit s"
  return "$code"
}
exact() { local limit=$1; shift; run "$limit" "$PYTHON" -m exact_megatron "$@"; }
