#!/usr/bin/env bash
# Prints the README's table of training speed on one GPU, in under ten minutes on an H200: base, large and the giant's
# geometry in bf16 without recomputation, at several micro-batches, beside torchscale's three forward passes, eager in
# bf16 autocast, and compiled with fused attention; then ours with compiled blocks at the largest micro-batch, and our
# operations against plain torch.
#
#   tools/benchmark_gpu.sh OUT      writes each record to OUT/*.json and the tables to OUT/table.txt
#   TINY=1 tools/benchmark_gpu.sh OUT   the same with toy sizes, on any machine: shows that it runs
#
# Needs torch, torchscale (pip install --no-deps torchscale==0.3.0) and this repository; PYTHON names the interpreter.

set -euo pipefail

out=${1:?usage: tools/benchmark_gpu.sh OUT}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p "$out"
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ -n ${TINY:-} ]]; then
    tiny="--layers 1 --width 16 --heads 2 --ffn_width 24 --patch_size 8 --image_size 32 --vocab_size 60"
    tiny+=" --visual_vocab_size 20 --text_length 9 --caption_lengths 4 7 --repeats 1 --threads 1"
    batches_of() { echo 1; }
    alone_of() { echo 2; }
    kernels_of() { echo 2; }
    geometry_of() { echo "$tiny"; }
    precision=fp32 peers=() repeats=1
    kernels="--tokens 8 --ffn_width 16 --masked 4 --classes 20" attention="--samples 1 --patches 4 --text_length 3 --heads 2"
else
    # Samples of each of the three streams: what fits beside torchscale, and for ours alone up to what fills 139 GiB.
    batches_of() { case $1 in base) echo 64 ;; large) echo 32 ;; giant) echo 8 ;; esac; }
    alone_of() { case $1 in base) echo 128 256 ;; large) echo 64 128 ;; giant) echo 16 24 32 ;; esac; }
    # With our Triton kernels and with compiled blocks, at one of them: making the code takes a minute or more.
    kernels_of() { case $1 in base) echo 256 ;; large) echo 128 ;; giant) echo 24 ;; esac; }
    geometry_of() {
        case $1 in
        base) echo "--layers 12 --width 768 --heads 12 --ffn_width 3072 --patch_size 16" ;;
        large) echo "--layers 24 --width 1024 --heads 16 --ffn_width 4096 --patch_size 16" ;;
        giant) echo "--layers 40 --width 1408 --heads 16 --ffn_width 6144 --patch_size 14" ;;
        esac
        echo "--text_length 512 --caption_lengths 8 64 --repeats 5"
    }
    precision=bf16 peers=(--compile) repeats=20
    kernels="--tokens 32768 --masked 4096" attention="--samples 32 --text_length 512 --heads 16"
fi

# run NAME ARGUMENT...: one record and its table; what does not fit is said and left out.
run() {
    local name=$1
    shift
    if "$python" tools/benchmark.py "$@" --json >"$out/$name.json" 2>"$out/$name.log"; then
        echo "$name: done after $SECONDS s"
    else
        rm -f "$out/$name.json"
        echo "$name: left out, $(tail -n 1 "$out/$name.log")"
    fi
}

for model in giant base large; do
    for batch in $(batches_of $model); do
        # shellcheck disable=SC2046
        run "$model-$batch" model $(geometry_of $model) --images "$batch" --texts "$batch" --pairs "$batch" \
            --precision $precision --profile "${peers[@]}"
    done
    for batch in $(alone_of $model); do
        # shellcheck disable=SC2046
        run "$model-$batch" model $(geometry_of $model) --images "$batch" --texts "$batch" --pairs "$batch" \
            --precision $precision --profile --alone
    done
    for batch in $(kernels_of $model); do
        for kind in triton compiled; do
            # shellcheck disable=SC2046
            run "$model-$batch-$kind" model $(geometry_of $model) --images "$batch" --texts "$batch" \
                --pairs "$batch" --precision $precision --profile --alone --kernels $kind
        done
    done
done
# shellcheck disable=SC2086
{
    run kernels kernels $kernels --precision $precision --repeats $repeats
    run attention attention $attention --precision $precision --repeats $repeats
}

"$python" - "$out" <<'PYTHON' | tee "$out/table.txt"
import json, sys
from pathlib import Path

print("| model, batch of each stream | s/step | tokens/s | MFU of peak | of the GEMM rate | GEMMs' share | memory GB | torchscale eager | compiled, SDPA |")
print("|---|---|---|---|---|---|---|---|---|")
for path in sorted(Path(sys.argv[1]).glob("*-*.json")):
    record = json.loads(path.read_text())
    ours = record["contenders"][0]
    percent = lambda x: "-" if x is None else f"{x:.1%}"
    times = lambda x: "-" if x is None else f"{x:.2f}x"
    print(
        f"| {path.stem} | {ours['step_s']:.4f} | {record['tokens'] / ours['step_s']:,.0f} | {percent(record['mfu'])} "
        f"| {percent(record['model_tflops'] / record['matmul_tflops'])} | {percent(record['matmul_share'])} "
        f"| {'-' if ours['activation_gb'] is None else format(ours['activation_gb'], '.1f')} | {times(record['ratio_vs_torchscale'])} "
        f"| {times(record['ratio_vs_torchscale_compiled'])} |"
    )
for name in ("kernels", "attention"):
    path = Path(sys.argv[1]) / f"{name}.json"
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        print(f"{row['name']}: plain / ours {row['ratio']:.2f}, kept {row['kept_ratio']:.2f}, peak {row['peak_ratio']:.2f}")
PYTHON
