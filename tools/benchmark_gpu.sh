#!/usr/bin/env bash
# Measures training on one GPU in under eight minutes on an H200, the most valuable figure first. Every step has a limit
# of its own, so that one that fails or hangs costs nothing but its figure; each figure is printed once it is there.
#
#   tools/benchmark_gpu.sh OUT [PART ...]         records in OUT/*.json, what was printed in OUT/*.log; all parts or some
#   TINY=1 tools/benchmark_gpu.sh OUT [PART ...]  the same with toy sizes, on any machine: shows that it runs
#
#   giant32 giant16 base128          launchers/pretrain.py: 3 x 32, 3 x 16, 3 x 128 samples a step, ZeRO-1
#   giant32_fp8                      giant32 with --precision fp8, where torchao is there
#   giant16_graphs                   giant16 with --cuda_graphs true
#   giant32_zero3 giant16_zero3      giant32 and giant16 under ZeRO-3
#   kernels attention                our operations one by one against torch and against the rate of a copy
#   torchscale                       base beside torchscale's three forward passes, eager and compiled
#   tests                            tests/gpu
#   giant32_graphs giant8 large64 base128_compiled    not among all, only when named
#
# Needs no installed project and no network: torch, DeepSpeed and the rest may lie on PYTHONPATH. PYTHON names the
# interpreter; ARGUMENTS go to every pretrain.py (ARGUMENTS="--kernels torch"); DATA is a folder for what it reads, kept
# for the next call (default: OUT/data).

set -euo pipefail

out=${1:?usage: tools/benchmark_gpu.sh OUT [PART ...]}
mkdir -p "$out"
out=$(realpath "$out")
data=$(realpath -m "${DATA:-$out/data}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usual=(giant32 giant16 base128 giant16_graphs giant32_fp8 giant32_zero3 giant16_zero3 kernels attention torchscale tests)
parts=("${@:2}")
((${#parts[@]})) || parts=("${usual[@]}")
for part in "${parts[@]}"; do
    [[ " ${usual[*]} giant32_graphs giant8 large64 base128_compiled " == *" $part "* ]] ||
        { echo "benchmark_gpu.sh: there is no part $part" >&2 && exit 2; }
done
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
read -ra arguments <<<"${ARGUMENTS:-}"

if [[ -n ${TINY:-} ]]; then
    memory=1000 precision=fp32 fp8=fp8_emulated pictures=64 repeats=1 long=4
    steps=(--steps 4 --last 2)
    kernels=(--tokens 8 --width 16 --ffn_width 16 --masked 4 --classes 20)
    attention=(--samples 1 --patches 4 --text_length 3 --heads 2)
    peer=(--layers 1 --width 16 --heads 2 --ffn_width 24 --patch_size 8 --image_size 32 --vocab_size 60
        --visual_vocab_size 20 --text_length 9 --caption_lengths 4 7 --images 1 --texts 1 --pairs 1)
    export FILES=${FILES:-use} BEIT3_TEST_DEVICE=cpu
else
    # GB of the GPU, which decides what is tried at all.
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1) ||
        { echo "benchmark_gpu.sh: nvidia-smi finds no GPU; TINY=1 shows on any machine that it runs" >&2; exit 2; }
    memory=$((memory * 1048576 / 1000000000)) precision=bf16 fp8=fp8 pictures=1024 repeats=10 long=1
    steps=(--steps 30 --last 12)
    kernels=(--tokens 32768 --width 1408 --ffn_width 6144 --masked 4096)
    attention=(--samples 32 --patches 257 --text_length 512 --heads 16)
    peer=(--layers 12 --width 768 --heads 12 --ffn_width 3072 --patch_size 16 --images 64 --texts 64 --pairs 64
        --text_length 512 --caption_lengths 8 64 --compile)
fi

# limited SECONDS NAME COMMAND...: a record; what fails is said, its whole output is in OUT/NAME.log.
limited() {
    local limit=$(($1 * long)) name=$2 code=0
    shift 2
    echo "== $name, after $SECONDS s"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.json" 2>"$out/$name.log" || code=$?
    if ((code == 0)); then
        echo "== $name done after $SECONDS s"
        return
    fi
    ((code != 124)) || echo "it took more than $limit s" >>"$out/$name.log"
    echo "== $name left out: $(tail -n 1 "$out/$name.log")"
}

# run NAME RECIPE SAMPLES ZERO_STAGE GB ARGUMENT...: steps of launchers/pretrain.py, unless the GPU has less memory.
run() {
    local name=$1 recipe=$2 samples=$3 zero=$4 needed=$5
    shift 5
    if ((memory < needed)); then
        echo "== $name left out: the GPU has $memory GB, it takes about $needed"
        return
    fi
    [[ -z ${TINY:-} ]] || { recipe=demo samples=$((1 + samples / 32)); }
    recipe=launchers/recipes/$recipe.yaml
    [[ -e $data/made ]] || limited 60 data "$python" tools/benchmarks/run.py make "$data" --recipe "$recipe" \
        --pictures $pictures
    limited 110 "$name" "$python" tools/benchmarks/run.py measure "$data" --recipe "$recipe" --samples "$samples" \
        --zero_stage "$zero" --limit $((95 * long)) "${steps[@]}" --log "$out/$name-pretrain.log" --json \
        ${arguments[@]+"${arguments[@]}"} "$@"
    [[ ! -s $out/$name.json ]] || tail -n 1 "$out/$name.log"
}

benchmark() {
    local limit=$1 name=$2
    shift 2
    limited "$limit" "$name" "$python" tools/benchmark.py "$@" --precision $precision --repeats $repeats --json
}

for part in "${parts[@]}"; do
    case $part in
    giant32) run giant32 giant 32 1 100 ;;
    giant16) run giant16 giant 16 1 70 ;;
    giant32_fp8) run giant32_fp8 giant 32 1 100 --precision "$fp8" ;;
    giant16_graphs) run giant16_graphs giant 16 1 75 --cuda_graphs true ;;
    giant32_graphs) run giant32_graphs giant 32 1 105 --cuda_graphs true ;;
    giant8) run giant8 giant 8 1 50 ;;
    giant32_zero3) run giant32_zero3 giant 32 3 100 ;;
    giant16_zero3) run giant16_zero3 giant 16 3 70 ;;
    base128) run base128 base 128 1 50 ;;
    base128_compiled) run base128_compiled base 128 1 50 --kernels compiled ;;
    large64) run large64 large 64 1 60 ;;
    kernels) benchmark 60 kernels kernels "${kernels[@]}" ;;
    attention) benchmark 60 attention attention "${attention[@]}" ;;
    torchscale) benchmark 120 torchscale model "${peer[@]}" ;;
    tests) limited 185 tests env PYTHON="$python" bash tests/gpu/run.sh "$out/tests" ;;
    esac
done

"$python" - "$out" <<'PYTHON' | tee "$out/table.txt"
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
records = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))
           if path.stem not in ("tests", "data") and path.read_text().startswith("{")}

print("| launchers/pretrain.py | s/step | tokens/s | of peak | GB | waiting for data |")
print("|---|---|---|---|---|---|")
for it in (r for r in records.values() if "zero_stage" in r):
    name = " ".join([it["recipe"], f"ZeRO-{it['zero_stage']}, 3 x {it['samples']}", *it["arguments"]])
    if "step_s" not in it:
        print(f"| {name} | {it['left_out']} | | | | |")
        continue
    mfu = f"{it['mfu']:.1%}" if "mfu" in it else "-"
    print(f"| {name} | {it['step_s']:.4f} | {it['tokens_per_s']:,.0f} | {mfu} | {it['memory_gb']:.1f} "
          f"| {it['data_wait_s'] * 1e3:.0f} ms |")
if it := records.get("torchscale"):
    print("\nits time / ours: " + ", ".join(
        f"{c['name']} {c['step_s'] / it['contenders'][0]['step_s']:.2f}" for c in it["contenders"][1:]))
    print(f"activations, ours / theirs: {it['activation_memory_ratio_vs_torchscale'] or '-'}")
for name in ("kernels", "attention"):
    for row in records.get(name, {}).get("rows", []):
        print(f"{row['name']}: plain / ours {row['ratio']:.2f}, kept {row['kept_ratio']:.2f}, "
              f"peak {row['peak_ratio']:.2f}, {row['copy_share']:.0%} of a copy's rate")
PYTHON
[[ ! -s $out/tests.json ]] || tail -n 1 "$out/tests.json"
echo "== all after $SECONDS s"
