#!/usr/bin/env bash
# Fine-tunes the demo's model on six small tasks, on two CPU cores: bash launchers/demo_tasks.sh [TASK ...]
#
# Needs what launchers/demo.sh leaves in demo/, and most of an hour. Each task runs twice with the same steps: from the
# demo's pretraining and from random weights; a question-only model shows what vqa is worth without images. The table
# at the end compares them. Everything lies in demo/tasks/; what is already there is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tasks=demo/tasks
all=(shapes captioning retrieval text vqa questions nlvr2)
more=(objects segmentation) # by name alone: they take longer
chosen=("${@:-${all[@]}}")
for name in "${chosen[@]}"; do
    [[ " ${all[*]} ${more[*]} " == *" $name "* ]] ||
        { echo "demo_tasks.sh: there is no task $name, only ${all[*]} ${more[*]}" >&2; exit 2; }
done
source launchers/environment.sh
checkpoint=demo/run/checkpoints/$(<demo/run/checkpoints/latest)
[[ -e $tasks/demo.json ]] || python tools/build_index.py demo "$tasks" --text_tokenizer demo/text_tokenizer.spm

finetune() { # TASK INDEX OUT [--field VALUE ...]
    local task=$1 index=$2 out=$tasks/runs/$3 recipe=launchers/recipes/finetune/demo_$1.yaml
    shift 3
    [[ -e $out/model ]] && return
    [[ -e $recipe ]] || recipe=launchers/recipes/finetune/demo.yaml
    OMP_NUM_THREADS=1 deepspeed --quiet --num_accelerators 2 --master_port "${BEIT3_PORT:-29512}" launchers/finetune.py \
        --config "$recipe" --task "$task" --out "$out" --checkpoint.resume auto \
        --data.train "$tasks/$index.train.jsonl" --data.validation "$tasks/$index.test.jsonl" "$@"
}

for name in "${chosen[@]}"; do
    case $name in
    shapes) settings=(imagenet shapes --data.answers "$tasks/shapes.classes.txt" --steps 400) ;;
    captioning) settings=(captioning captioning --data.text_length 12 --steps 200) ;;
    retrieval) settings=(retrieval retrieval --steps 300) ;;
    vqa) settings=(vqa vqa --data.answers "$tasks/answer2label.txt" --steps 1000) ;;
    questions) settings=(text questions --data.answers "$tasks/answer2label.txt" --steps 600) ;;
    text) settings=(text text --data.answers "$tasks/text.classes.txt" --optim.warmup_steps 10 --steps 30) ;;
    nlvr2) settings=(nlvr2 nlvr2 --optim.lr 1e-3 --steps 1400) ;;
    objects) settings=(instance_segmentation objects) ;;
    segmentation) settings=(segmentation segmentation) ;;
    esac
    for start in pretrained random; do
        printf '\n\033[1m== %s, from %s weights\033[0m\n' "$name" "$start"
        init=()
        [[ $start == pretrained ]] && init=(--init_from "$checkpoint")
        finetune "${settings[0]}" "${settings[1]}" "$name-$start" "${settings[@]:2}" "${init[@]}"
    done
done
python tools/compare_tasks.py "$tasks/runs"
