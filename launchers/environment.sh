#!/usr/bin/env bash
# Makes the Python environment that the demo, the tests and CI run in, once, and enters it.
#
#   source launchers/environment.sh     makes it if needed and enters it; returns 1 after one clear line where it cannot
#   bash launchers/environment.sh       only makes it
#
# BEIT3_VENV names its folder; the default is .venv in the repository. The folder holds a stamp: a hash of what it was
# made from and the packages that were installed. A folder without a fitting stamp is made anew.

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    bash "${BASH_SOURCE[0]}" || return 1
    source "${BEIT3_VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/activate"
    # DeepSpeed guesses the device from the packages that it finds; a machine without an NVIDIA driver is a CPU machine.
    [[ -e /dev/nvidiactl ]] || export DS_ACCELERATOR=cpu
    return 0
fi

set -euo pipefail

fail() {
    echo "environment: $1" >&2
    exit 1
}

# stage LINE COMMAND...: prints the line and keeps the command's output in the log.
stage() {
    echo "environment: $1"
    if ! "${@:2}" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        fail "that failed; $log has the whole output, and the next call starts anew"
    fi
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${BEIT3_VENV:-$root/.venv}")
stamp=$venv/beit3-stamp.txt
log=$venv/install.log
python=$venv/bin/python
PATH=${PATH//"$venv/bin:"/} # called from inside it: what makes it anew must be another python3 than its own

# The path belongs to it: an environment that was moved has wrong paths in its scripts.
recipe=$({ cat "$root"/{pyproject.toml,constraints.txt,launchers/environment.sh}; echo "$venv"; } | sha256sum | cut -d' ' -f1)

# First the recipe's hash, then one installed package a line.
describe() {
    echo "$recipe"
    "$python" -c 'from importlib.metadata import distributions as d; print(*(f"{p.name}=={p.version}" for p in d()), sep="\n")'
}

# Whole: every line of the stamp still holds. Packages that someone added by hand do no harm.
is_whole() {
    [[ -s $stamp && -x $python ]] && [[ -z $(comm -23 <(sort "$stamp") <(describe 2>/dev/null | sort)) ]]
}

# Two callers at once: the second waits and then finds the environment made.
exec 9<"${BASH_SOURCE[0]}"
flock 9

is_whole && exit 0

command -v python3 >/dev/null || fail "there is no python3 on the PATH; install Python 3.11 or newer"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "the pinned packages need Python 3.11 or newer, but python3 is $(python3 --version 2>&1)"
python3 -c 'import ensurepip, venv' 2>/dev/null ||
    fail "this python3 cannot make virtual environments; install its venv module (Debian: apt-get install python3-venv)"

if [[ -d $venv && -n $(ls -A "$venv") ]]; then
    [[ -e $log ]] || fail "$venv was not made by this script; remove it or name another folder in BEIT3_VENV"
    echo "environment: $venv is out of date or not whole: making it anew"
    rm -rf "$venv"
fi

mkdir -p "$venv"
: >"$log"
cd "$root"
export DS_BUILD_OPS=0 # DeepSpeed's operators are compiled when first used, not while it is installed
install=("$python" -m pip install --no-input --disable-pip-version-check --constraint constraints.txt)

stage "1/5 a virtual environment in $venv" python3 -m venv "$venv"
# torch alone and first: another package's wider range would bring another build of it.
stage "2/5 torch and what builds packages" "${install[@]}" torch setuptools wheel ninja
# These declare what the tests do without: torchscale, which the parity tests compare with, packages of years ago;
# CLIP_benchmark scikit-learn and Java's scores of captions; trackio and Gradio (and what it brings) a Pillow before 13.
bare=(
    torchscale clip-benchmark trackio gradio gradio-client hf-gradio groovy safehttpx brotli orjson pandas pydub
    python-multipart pytz semantic-version tomlkit
)
# DeepSpeed's build imports torch, so it must see this environment's. Wheels of what is to be built come from here too.
mapfile -t packages < <("$python" - "${bare[@]}" <<'PYTHON'
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
used = ("demo", "dev", "hub", "trackers", "data", "detection", "docs")
packages = [*project["dependencies"], *(package for extra in used for package in extras[extra])]
print(*(package for package in packages if re.match(r"[\w-]+", package)[0] not in sys.argv), sep="\n")
PYTHON
)
stage "3/5 the packages of pyproject.toml" "${install[@]}" --no-build-isolation "${packages[@]}"
stage "4/5 this project" "${install[@]}" --no-build-isolation --no-deps --editable .
stage "5/5 what declares other packages than it needs here" "${install[@]}" --no-build-isolation --no-deps "${bare[@]}"

describe >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "environment: ready in $SECONDS s"
