#!/usr/bin/env bash
# The suite for one GPU, in at most three minutes: each file of tests/gpu in a process of its own, all at the same time,
# so that the seconds of their imports and compilers pass together and an error of the device spoils one file only.
#
#   bash tests/gpu/run.sh [OUT]                         each file's output in OUT/NAME.log; all is printed at the end
#   FILES="kernels zero" bash tests/gpu/run.sh          some of the files
#   BEIT3_TEST_DEVICE=cpu bash tests/gpu/run.sh         dry run: small sizes on the CPU, one file after the other
#
# Needs no installed project: torch, DeepSpeed, pytest and the rest may lie on PYTHONPATH. PYTHON names the interpreter.
# Exit code 0: all passed, or there is no GPU, which is said. LIMIT: seconds that a file may take.

set -euo pipefail

here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
out=$(realpath -m "${1:-$(mktemp -d)}")
mkdir -p "$out"
cd "$here/../.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ -z ${BEIT3_TEST_DEVICE:-} ]]; then
    reason=$("$python" -c 'import torch
torch.cuda.is_available() or print("torch", torch.__version__, "finds no CUDA device that it can use")') ||
        { echo "tests/gpu: $python cannot import torch" >&2; exit 1; }
    if [[ -n $reason ]]; then
        echo "tests/gpu: skipped: $reason"
        exit 0
    fi
    export BEIT3_TEST_DEVICE=cuda
fi
if [[ $BEIT3_TEST_DEVICE == cuda ]]; then
    at_once=8 limit=${LIMIT:-170}
    unset DS_ACCELERATOR TRITON_INTERPRET
else
    at_once=1 limit=${LIMIT:-900}
fi

# one NAME: runs a file and leaves its exit code; what ends without a word is found by the missing code.
one() {
    local code=0
    timeout --kill-after=5 "$limit" "$python" -m pytest -q -p no:cacheprovider --durations=5 "tests/gpu/test_$1.py" \
        >"$out/$1.log" 2>&1 || code=$?
    echo "$code" >"$out/$1.code"
    ((code != 124)) || echo "tests/gpu: $1 took more than $limit s" >>"$out/$1.log"
}
export -f one
export out python limit

read -ra names <<<"${FILES:-$(cd "$here" && for file in test_*.py; do file=${file#test_}; echo -n "${file%.py} "; done)}"
rm -f "$out"/*.code
printf '%s\n' "${names[@]}" | xargs -P "$at_once" -I NAME bash -c 'one NAME'

failed=()
for name in "${names[@]}"; do
    echo "== $name"
    cat "$out/$name.log"
    [[ $(cat "$out/$name.code") == 0 ]] || failed+=("$name")
done
echo "tests/gpu: ${#names[@]} files after $SECONDS s; failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
