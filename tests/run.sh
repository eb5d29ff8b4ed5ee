#!/usr/bin/env bash
# Lint, types, then the tests, in the project's own environment.
#
#   tests/run.sh                                  everything, the fast tests first
#   tests/run.sh --quick                          three minutes: the fast tests of unit and parity
#   tests/run.sh tests/unit/test_order.py -k seed any other arguments are pytest's: one test after the other
#   tests/run.sh -n 2 -m 'not slow'               or by two processes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/environment.sh

# One thread per process: tests start several processes on few cores, and threads that wait for one another cost more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Each of the hundreds of processes that they start would compile our modules anew.
unset PYTHONDONTWRITEBYTECODE

ruff check .
mypy beit3_dist

# On all cores: whoever has nothing left takes tests from the others. Those of parallel and integration start several
# processes each, and those of one file share them; on many cores a few at once would use up the memory.
fast=(-n logical --maxprocesses 8 --dist worksteal)
several=(-n logical --maxprocesses 2 --dist loadfile)

if [[ ${1-} == --quick ]]; then
    exec python -m pytest -q "${fast[@]}" -m 'not slow' tests/unit tests/parity "${@:2}"
elif (($#)); then
    exec python -m pytest "$@"
fi
failed=0
python -m pytest "${fast[@]}" tests/unit tests/parity tests/golden || failed=$?
python -m pytest "${several[@]}" tests/parallel tests/integration || failed=$?
python -m pytest tests/slurm || failed=$?
exit "$failed"
