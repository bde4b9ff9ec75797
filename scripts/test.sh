#!/usr/bin/env bash
# Installs the bundle with its test extra and runs the tests. Arguments go to pytest: bash scripts/test.sh -k losses
# Cases on real data run where CHEST_CT_DATA holds it; everything else runs on phantom data.
# Up to four files of tests run at a time, each on one thread; -n 0 runs one test after the other.
set -euo pipefail
. "$(dirname "$0")/environment.sh" test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
