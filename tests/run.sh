#!/usr/bin/env bash
# Lint, types, then the tests, in the project's own environment. Arguments go to pytest:
#
#   tests/run.sh                                  everything, the fast tests first: unit, parity, golden, parallel, ...
#   tests/run.sh --quick                          minutes: the fast tests of unit and parity, by two processes
#   tests/run.sh -m 'not slow'                    without the slow ones
#   tests/run.sh tests/unit/test_order.py -k seed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/environment.sh

# One thread per process: tests start several processes on few cores, and threads that wait for one another cost more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ruff check .
mypy beit3_dist
[[ ${1-} == --quick ]] || exec python -m pytest "$@"

# Every second file for each; the second one's output comes when the first has ended.
files=(tests/unit/test_*.py tests/parity/test_*.py)
halves=("" "")
for number in "${!files[@]}"; do halves[number % 2]+="${files[number]} "; done
second=$(mktemp)
trap 'rm -f "$second"' EXIT
python -m pytest -q -m 'not slow' "${@:2}" ${halves[1]} >"$second" 2>&1 &
failed=0
python -m pytest -q -m 'not slow' "${@:2}" ${halves[0]} || failed=$?
wait $! || failed=$?
cat "$second"
exit "$failed"
