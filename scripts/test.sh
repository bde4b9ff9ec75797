#!/usr/bin/env bash
# Installs the bundle with its test extra and runs the tests, on every core. Arguments go to pytest: bash scripts/test.sh -k losses
# Without arguments it leaves out tests/integration, which runs whole commands: bash scripts/test.sh tests runs everything.
# Cases on real data run where CHEST_CT_DATA holds it; everything else runs on phantom data.
set -euo pipefail
. "$(dirname "$0")/environment.sh" test
export OMP_NUM_THREADS=1 # one process a core
[ $# -gt 0 ] || set -- --ignore=tests/integration
python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
