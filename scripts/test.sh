#!/usr/bin/env bash
# Installs the bundle with its test extra and runs the tests. Arguments go to pytest: bash scripts/test.sh -k losses
# Cases on real data run where CHEST_CT_DATA holds it; everything else runs on phantom data.
set -euo pipefail
. "$(dirname "$0")/environment.sh" test
python -m pytest "$@"
