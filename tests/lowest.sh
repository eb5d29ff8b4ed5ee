#!/usr/bin/env bash
# The other end of pyproject.toml's ranges: a choice of the tests with the lowest version of each package, beside the torch
# that is installed.
#
#   bash tests/lowest.sh    in the environment that is entered, or else in the project's own; it changes neither
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${VIRTUAL_ENV:-} ]] || source launchers/environment.sh

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Not torch, which is large: the job `lowest` of .github/workflows/ci.yml has its lowest version. Not Gradio either
# (docs/questions.md says what was tried by hand), nor what needs a GPU, builds pages or is for the tests alone.
mapfile -t lowest < <(python - <<'PYTHON'
import re, tomllib
from importlib.metadata import version

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = ("hub", "trackers", "data", "detection")
named = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
bounds = dict(match.groups() for each in named if (match := re.match(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", each)))
print(*(f"{name}=={low}" for name, low in bounds.items() if name != "torch" and version(name) != low), sep="\n")
PYTHON
)
# What these bring along themselves, in versions that they go with.
brought=('huggingface_hub==1.10.0' 'protobuf<7' six sentry_sdk)
echo "lowest: ${lowest[*]}"
DS_BUILD_OPS=0 python -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-build-isolation \
    --target "$folder" "${lowest[@]}" "${brought[@]}"

export OMP_NUM_THREADS=1 PYTHONPATH=$PWD:$folder
python -m pytest -q -p no:cacheprovider \
    tests/unit/test_command_line.py \
    tests/integration/test_session.py::test_runs_in_this_process \
    'tests/unit/test_hub.py::test_logits_are_ours[sdpa-vqa]' tests/unit/test_hub.py::test_timm_loads_its_folder \
    tests/unit/test_hub.py::test_pipelines_of_the_library tests/unit/test_hub_export.py::test_onnx_graphs \
    tests/unit/test_trackers.py \
    tests/unit/test_parquet.py::test_pairs_classes_and_bad_rows \
    tests/unit/test_data_card.py::test_the_card_and_shards_without_duplicates \
    tests/unit/test_average_precision.py::test_it_is_pycocotools_summary_on_random_guesses \
    tests/unit/test_json_tokenizer.py::test_words_are_the_librarys_by_the_released_ids
