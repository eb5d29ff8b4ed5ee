#!/usr/bin/env bash
# Lint, types, then the tests, in the project's own environment. Arguments go to pytest:
#
#   tests/run.sh                                  everything, the fast tests first: unit, parity, parallel, integration
#   tests/run.sh -m 'not slow'                    without the slow ones
#   tests/run.sh tests/unit/test_order.py -k seed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/environment.sh

# One thread per process: tests start several processes on few cores, and threads that wait for one another cost more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

ruff check .
mypy beit3_dist
exec python -m pytest "$@"
