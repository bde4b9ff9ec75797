#!/usr/bin/env bash
# Writes the last commit as an archive in the layout of MONAI's model zoo: bash scripts/package.sh chest_ct_multitask_v0.2.0.zip
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/package.sh FILE.zip" >&2; exit 2; }
root=$(dirname "${BASH_SOURCE[0]}")/..
git -C "$root" archive --format=zip --prefix=chest_ct_multitask/ HEAD LICENSE bundle configs docs models > "$1"
