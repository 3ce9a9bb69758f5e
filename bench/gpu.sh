#!/usr/bin/env bash
# On a machine with a CUDA device and no network: install from this checkout, run the GPU tests and every benchmark's CUDA part with rows.
#   bash bench/gpu.sh [folder with wheels of the rivals that are missing there: captum, opacus, backpack-for-pytorch]
# What is appended to bench/results/ is also copied to $OUT, if that is set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m pip install -q --no-build-isolation --no-deps -e . || exit 1
[ $# -gt 0 ] && python -m pip install -q --no-deps "$1"/*.whl
python -m infoutil_fast info
python -m pytest -q -m gpu tests
for part in masked_patches assemble_patterns shapley conv_grad_sqnorm linear_grad_sqnorm; do  # one process each: a failure or a full memory does not end the others
  timeout 420 python -m pytest -q bench -k "$part and cuda" --record
done
timeout 120 python bench/gram_rule.py --device cuda --record
timeout 600 python bench/gradnorms.py --device cuda --record --cases convnet3:32:256 resnet18-small:32:256 resnet18:224:64 resnet50:224:64 vit-s:224:64
[ -n "${OUT:-}" ] && cp bench/results/*.jsonl "$OUT"
