#!/usr/bin/env bash
# The first minutes: a report from the shipped weights, then a training that learns. Offline after the installation.
# Both use phantoms, which are artificial chests; nothing here says how well a network does on patients.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
out=output/quickstart
start=$SECONDS
mkdir -p "$out"

echo "1/3 The shipped weights look at a phantom: an artificial chest with hazy opacities"
python -c "from bundle.data.phantom import make_volume; make_volume('$out/phantom.nii.gz', slices=8)"
chestct predict "$out/phantom.nii.gz" -o "$out/report"

echo "2/3 A small network learns all four tasks on 72 phantom slices"
chestct train run -o "$out/run" --config preset_quickstart --resume False

echo "3/3 It is measured on the 18 slices of other phantoms"
chestct evaluate -o "$out/run" --bootstrap 100 --failures True
python - "$out/run" <<'PYTHON'
import json, sys

losses = [epoch["loss"] for epoch in json.load(open(f"{sys.argv[1]}/history.json"))]
heights = [round(7 * (loss - min(losses)) / (max(losses) - min(losses))) for loss in losses]
print("loss by epoch:", "".join("▁▂▃▄▅▆▇█"[height] for height in heights), f"{losses[0]:.2f} to {losses[-1]:.2f}")
PYTHON

echo "Done in $((SECONDS - start)) s. Where to look:"
echo "  $out/report/*/report.html           what the shipped weights say of the phantom, slice by slice"
echo "  $out/run/evaluation/failures.png    the worst answers of the new network beside the truth"
echo "  $out/run/evaluation/metrics.json    its figures on the test split; curves.png in $out/run"
