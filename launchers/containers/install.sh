#!/usr/bin/env bash
# Installs this package and what it needs for containers: both recipes of images call it in the repository's root.
#
#   bash launchers/containers/install.sh EXTRAS [FOLDER]     such as: train-gpu,demo /opt/beit3
#
# TORCH_INDEX names another index of packages for torch, such as the one of its builds for CPUs alone, which are a fifth
# of the size; torch's page on installing has their addresses.
set -euo pipefail

extras=$1 folder=${2:-/opt/beit3}
export DS_BUILD_OPS=0 # DeepSpeed's operators are compiled when first used
python3 -m venv "$folder"
install=("$folder/bin/python" -m pip install --no-cache-dir --no-input --constraint constraints.txt)
"${install[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
"${install[@]}" setuptools wheel ninja
"${install[@]}" --no-build-isolation ".[$extras]" # DeepSpeed's build imports torch
"$folder/bin/beit3" --version
