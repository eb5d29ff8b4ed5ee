#!/usr/bin/env bash
# Pretrains a small BEiT-3 on real data, from nothing, on two CPU cores: bash launchers/demo.sh [--short]
#
# Makes its own environment, builds tar shards from data sets that come with pip, trains both tokenizers, pretrains with
# two processes under ZeRO-3, kills the run half way, resumes it, and draws what was learnt. Everything lies in demo/
# (--short: fewer steps, in demo-short/). What is already there is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=demo tokenizer_steps=300 steps=1500
case "${1-}" in
"") ;;
--short) demo=demo-short tokenizer_steps=60 steps=60 ;;
*) echo "usage: bash launchers/demo.sh [--short]" >&2; exit 2 ;;
esac
run=$demo/run
say() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

say "1/6 environment"
source launchers/environment.sh

say "2/6 tar shards: OpenMoji images with their names, easy-VQA images with captions, a dictionary's text"
python tools/build_shards.py demo "$demo/shards"

say "3/6 text tokenizer"
if [[ ! -e $demo/text_tokenizer.spm ]]; then
    python tools/train_text_tokenizer.py --shards "$demo/shards/texts/train/*.tar" "$demo/shards/pairs/train/*.tar" \
        --pieces 4000 --out "$demo/text_tokenizer.spm"
fi

say "4/6 image tokenizer: 256 visual codes, taught by an ImageNet network"
if [[ ! -e $demo/image_tokenizer/image_tokenizer.pth ]]; then
    # Two processes of one thread: a quarter faster than two threads of one process, and other work on the cores slows
    # them down by its share only, where OpenMP's threads would wait for one another at every operation.
    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 \
        launchers/train_image_tokenizer.py --config launchers/recipes/image_tokenizer_demo.yaml \
        --out "$demo/image_tokenizer" --data.images "$demo/shards/{images,pairs}/train/*.tar" --data.cache "$demo/cache" \
        --steps "$tokenizer_steps"
fi

say "5/6 pretraining with two processes under ZeRO-3, killed half way and resumed"
streams=()
for stream in images texts pairs; do
    streams+=("--data.$stream" "$demo/shards/$stream/train/*.tar" "--eval.$stream" "$demo/shards/$stream/held_out/*.tar")
done
pretrain() {
    deepspeed --quiet --num_accelerators 2 --master_port "${BEIT3_PORT:-29511}" launchers/pretrain.py \
        --config launchers/recipes/demo.yaml --out "$run" --steps "$steps" --checkpoint.every $((steps / 5)) \
        --eval.every $((steps / 5)) --checkpoint.resume auto --text_tokenizer "$demo/text_tokenizer.spm" \
        --image_tokenizer "$demo/image_tokenizer/image_tokenizer.pth" --data.cache "$demo/cache" \
        "${streams[@]}"
}
steps_done() { [[ -e $run/metrics.jsonl ]] && wc -l <"$run/metrics.jsonl" || echo 0; }

if (($(steps_done) == 0)); then
    set -m # the run in the background gets a process group of its own, so that all of it can be killed at once
    pretrain &
    while (($(steps_done) < steps / 2)); do
        sleep 1
        kill -0 $! 2>/dev/null || { wait $!; exit 1; }
    done
    kill -KILL -- -$!
    wait $! 2>/dev/null || true
    set +m
    echo "killed (SIGKILL) at step $(steps_done); the same command goes on from the newest checkpoint"
fi
if (($(steps_done) < steps)); then
    pretrain
fi

say "6/6 what it has learnt"
python tools/report.py "$run"
