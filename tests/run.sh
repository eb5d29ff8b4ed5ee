#!/usr/bin/env bash
# Lint, types, then the tests, in the project's own environment; a choice of them with the lowest versions of its packages.
#
#   tests/run.sh                                  everything, the fast tests first
#   tests/run.sh --quick                          five minutes: the fast tests of unit and parity
#   tests/run.sh tests/unit/test_order.py -k seed any other arguments are pytest's: one test after the other
#   tests/run.sh -n 2 -m 'not slow'               or by two processes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/environment.sh

# One thread per process: tests start several processes on few cores, and threads that wait for one another cost more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each of the hundreds of processes that they start would compile our modules anew.
unset PYTHONDONTWRITEBYTECODE

# Beside what follows, for what leaves cores idle: Slurm's jobs wait most of their time, mypy and pip have one thread.
aside=$(mktemp -d)
declare -A started=()
beside() { # NAME COMMAND...: in a process group of its own, which Ctrl-C reaches through `leave`
    set -m
    "${@:2}" >"$aside/$1" 2>&1 &
    started[$1]=$!
    set +m
}
ended() { # NAME: waits for it, shows what it printed, and has its exit code
    local code=0
    wait "${started[$1]}" || code=$?
    cat "$aside/$1"
    unset "started[$1]"
    return "$code"
}
leave() {
    for process in "${started[@]}"; do
        kill -INT -- "-$process" 2>/dev/null && wait "$process" || true
    done
    rm -rf "$aside"
}
trap leave EXIT

# On all cores: whoever has nothing left takes tests from the others. Those of parallel and integration start several
# processes each, and those of one file share them; on many cores a few at once would use up the memory. The files with
# the longest tests come first, so that nobody waits for one at the end.
fast=(-n logical --maxprocesses 8 --dist worksteal)
several=(-n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder)
failed=0

ruff check .
if (($#)) && [[ $1 != --quick ]]; then
    mypy beit3_dist
    python -m pytest "$@"
    exit
fi
beside types mypy beit3_dist
if (($#)); then
    python -m pytest -q "${fast[@]}" -m 'not slow' tests/unit tests/parity "${@:2}" || failed=$?
    ended types || failed=$?
    exit "$failed"
fi
beside slurm python -m pytest tests/slurm
beside lowest bash tests/lowest.sh
python -m pytest "${fast[@]}" tests/unit tests/parity tests/golden || failed=$?
ended types || failed=$?
ended lowest || failed=$?
python -m pytest "${several[@]}" tests/integration tests/parallel tests/scale || failed=$?
ended slurm || failed=$?
exit "$failed"
