#!/usr/bin/env bash
# On a Debian machine with a network, no GPU: real long documents, tokenised with the tokenizer of the model in $MODEL.
#
#   MODEL=~/models/SmolLM2-135M bash benchmarks/gpu/0_material.sh        # writes .gpu/data/corpus{,_valid}.{bin,idx,json}
#
# Kernel sources and their documentation (GPL-2), Perl's manual and one book of prose (GPL-2). The documents stay out of git.
# A second run goes on where the first stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
MODEL=${MODEL:?the folder with tokenizer.json and tokenizer_config.json}
WORK=${WORK:-.gpu/material}
DATA=${DATA:-.gpu/data}
PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p "$WORK/text" "$DATA"

if [ ! -e "$WORK/.text" ]; then
  ls "$WORK"/*.deb >/dev/null 2>&1 || (cd "$WORK" && apt-get download linux-source-6.1 linux-doc-6.1 perl-doc anarchism)
  for package in "$WORK"/*.deb; do dpkg-deb -x "$package" "$WORK/packages"; done
  archive=$(ls "$WORK"/packages/usr/src/linux-source-*.tar.xz)
  name=$(basename "$archive" .tar.xz)
  tar -xJf "$archive" -C "$WORK/text" --wildcards --transform "s,^$name,kernel," \
    "$name"/{mm,fs,net,block,lib,security,crypto,kernel,drivers/net/ethernet}/'*.c'
  mkdir -p "$WORK/text/docs" "$WORK/text/prose"
  cp -r "$WORK"/packages/usr/share/doc/linux-doc-*/html/_sources/. "$WORK/text/docs/"
  find "$WORK/text/docs" -name '*.gz' -exec gunzip -f {} +
  cp "$WORK"/packages/usr/share/doc/anarchism/markdown/* "$WORK/text/prose/"
  gunzip -f "$WORK"/text/prose/*.gz
  for pod in "$WORK"/packages/usr/share/perl/*/pod/*.pod; do cp "$pod" "$WORK/text/prose/$(basename "$pod" .pod).txt"; done
  touch "$WORK/.text"
fi
"$PYTHON" -m exact_megatron prepare "$WORK/text/kernel" "$WORK/text/docs" "$WORK/text/prose" \
  --tokenizer "$MODEL" --output "$DATA/corpus" --valid-fraction 0.03
"$PYTHON" -m exact_megatron census "$DATA/corpus" --seq-length 16384 --json "$DATA/census_16384.json"
