#!/usr/bin/env bash
# Measures training on one GPU, in under ten minutes on an H200: steps of the giant, base and large recipes in bf16
# without recomputation, at growing micro-batches and with each kind of kernels; the released geometries beside
# torchscale's three forward passes, eager in bf16 autocast, and compiled with fused attention; our operations against
# plain torch. Every figure is printed once it is there; the README's table comes at the end.
#
#   tools/benchmark_gpu.sh OUT [giant base large]   each record in OUT/*.json, the table in OUT/table.txt
#   TINY=1 tools/benchmark_gpu.sh OUT               the same with toy sizes, on any machine: shows that it runs
#
# Needs this repository's environment (launchers/environment.sh); PYTHON names another interpreter.

set -euo pipefail

out=${1:?usage: tools/benchmark_gpu.sh OUT [giant base large]}
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
models=("${@:2}")
((${#models[@]})) || models=(giant base large)
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ -n ${TINY:-} ]]; then
    recipe_of() { echo "--recipe launchers/recipes/demo.yaml --samples 1 2 --kernels torch compiled --repeats 1"; }
    peer_of() {
        echo "--layers 1 --width 16 --heads 2 --ffn_width 24 --patch_size 8 --image_size 32 --vocab_size 60"
        echo "--visual_vocab_size 20 --text_length 9 --caption_lengths 4 7 --images 1 --texts 1 --pairs 1 --repeats 1"
    }
    precision=fp32 repeats=1
    kernels="--tokens 8 --ffn_width 16 --masked 4 --classes 20" attention="--samples 1 --patches 4 --text_length 3 --heads 2"
else
    # Images, texts and pairs each: up to what fills 139 GiB, and what fits beside torchscale's model and moments.
    recipe_of() {
        case $1 in
        giant) echo "--samples 8 16 24 32" ;;
        base) echo "--samples 64 128 256" ;;
        large) echo "--samples 32 64 128" ;;
        esac
        echo "--recipe launchers/recipes/$1.yaml --kernels torch triton compiled --repeats 5 --profile"
    }
    peer_of() {
        local samples
        case $1 in
        giant) samples=8 && echo "--layers 40 --width 1408 --heads 16 --ffn_width 6144 --patch_size 14" ;;
        base) samples=64 && echo "--layers 12 --width 768 --heads 12 --ffn_width 3072 --patch_size 16" ;;
        large) samples=32 && echo "--layers 24 --width 1024 --heads 16 --ffn_width 4096 --patch_size 16" ;;
        esac
        echo "--images $samples --texts $samples --pairs $samples --text_length 512 --caption_lengths 8 64 --repeats 5"
    }
    precision=bf16 repeats=20
    kernels="--tokens 32768 --masked 4096" attention="--samples 32 --text_length 512 --heads 16"
fi

# run NAME COMMAND ARGUMENT...: a record; what fails is said, its whole error is in OUT/NAME.log.
run() {
    local name=$1
    shift
    echo "== $name, after $SECONDS s"
    if "$python" tools/benchmark.py "$@" --precision $precision --json 2> >(tee "$out/$name.log" >&2) >"$out/$name.json"; then
        echo "== $name done after $SECONDS s"
    else
        rm -f "$out/$name.json"
        echo "== $name left out, $(tail -n 1 "$out/$name.log")"
    fi
}

for model in "${models[@]}"; do
    # shellcheck disable=SC2046
    {
        run "$model" recipe $(recipe_of "$model")
        run "$model-torchscale" model $(peer_of "$model") --compile
    }
done
# shellcheck disable=SC2086
{
    run kernels kernels $kernels --repeats $repeats
    run attention attention $attention --repeats $repeats
}

"$python" - "$out" "${models[@]}" <<'PYTHON' | tee "$out/table.txt"
import json, sys
from pathlib import Path

def record(name):
    path = Path(sys.argv[1]) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": []}

def percent(x):
    return "-" if x is None else f"{x:.1%}"

print("| recipe, kernels, micro-batch | s/step | tokens/s | of peak | of its products' rate | products' share | GB |")
print("|---|---|---|---|---|---|---|")
for model in sys.argv[2:]:
    for row in record(model)["rows"]:
        name = f"| {model}, {row['kernels']}, 3 x {row['samples']} "
        if "left_out" in row:
            print(f"{name}| {row['left_out']} | | | | | |")
            continue
        memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.0f}"
        print(
            f"{name}| {row['step_s']:.4f} | {row['tokens_per_s']:,.0f} | {percent(row['mfu'])} "
            f"| {percent(row['model_tflops'] / row['products_tflops'])} | {percent(row['products_share'])} | {memory} |"
        )
print("\n| released geometry, bf16 | torchscale eager / ours | compiled, SDPA / ours | activations, ours / eager |")
print("|---|---|---|---|")
for model in sys.argv[2:]:
    if "contenders" in (it := record(f"{model}-torchscale")):
        eager, fused = it["ratio_vs_torchscale_fused_adamw"], it["ratio_vs_torchscale_compiled"]
        memory = it["activation_memory_ratio_vs_torchscale"]
        print(f"| {model} | {eager:.2f} | {fused:.2f} | {'-' if memory is None else format(memory, '.2f')} |")
print()
for name in ("kernels", "attention"):
    for row in record(name)["rows"]:
        print(f"{row['name']}: plain / ours {row['ratio']:.2f}, kept {row['kept_ratio']:.2f}, peak {row['peak_ratio']:.2f}")
PYTHON
