#!/usr/bin/env bash
# On a machine with a CUDA device and no network: install from this checkout, run the GPU tests and every benchmark's CUDA part with rows.
#   bash bench/gpu.sh [-w WHEELS] [PART ...]
# PARTS: tests, ops, shapley, norms, compiled; by default all, one after the other. Each ends within ten minutes.
# WHEELS: a folder with wheels of the rivals that are missing there: captum, opacus, backpack-for-pytorch.
# What is appended to bench/results/ is also copied to $OUT, if that is set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python -m pip install -q --no-build-isolation --no-deps -e . || exit 1
if [ "${1:-}" = -w ]; then
  python -m pip install -q --no-deps "$2"/*.whl || exit 1
  shift 2
fi
[ $# -gt 0 ] || set -- tests ops shapley norms compiled
cases=(convnet3:32:256 resnet18-small:32:256 resnet18:224:64 resnet50:224:64 vit-s:224:64)
rivals=(ours BackPACK torch.func loop "plain gn" "ours gn" "Opacus ghost" "Opacus hooks")

run() {
  case $1 in
    tests)
      python -m infoutil_fast info
      timeout 590 python -m pytest -q -m gpu tests ;;
    ops)  # one process each: a failure or a full memory does not end the others
      for op in masked_patches assemble_patterns conv_grad_sqnorm linear_grad_sqnorm; do
        timeout 130 python -m pytest -q bench -k "$op and cuda" --record
      done
      timeout 60 python bench/gram_rule.py --device cuda --record ;;
    shapley) timeout 590 python -m pytest -q bench -k "shapley and cuda" --record ;;
    norms) timeout 590 python bench/gradnorms.py --device cuda --record --rounds 5 --cases "${cases[@]}" --only "${rivals[@]}" ;;
    compiled) timeout 590 python bench/gradnorms.py --device cuda --record --cases "${cases[@]}" --only ours "ours compiled" "plain compiled" ;;
    *) echo "no part $1: tests, ops, shapley, norms, compiled" >&2; return 2 ;;
  esac
}

for part in "$@"; do
  run "$part"
done
[ -n "${OUT:-}" ] && cp bench/results/*.jsonl "$OUT"
