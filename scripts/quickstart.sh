#!/usr/bin/env bash
# From nothing to a trained, evaluated and used network on phantom data, offline after the installation.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
out=output/quickstart
small=configs/preset_smoke.json
start=$SECONDS

echo "1/3 Phantom data and the curriculum: classification, segmentation, detection, then all together"
python -m monai.bundle run training --config_file "['configs/train.json','$small']" --output_dir "$out" --resume False

echo "2/3 Evaluation on the test split"
python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']" --output_dir "$out"

echo "3/3 Prediction on a slice of each test patient"
mkdir -p "$out/slices"
cp data/phantom/images/p2[2-7]_1.nii.gz "$out/slices"
python -m monai.bundle run --config_file configs/inference.json \
    --input "$out/slices" --output_dir "$out/predictions" --checkpoint "$out/model.pt"

echo "Done in $((SECONDS - start)) s. Where to look (one epoch a stage on phantom data: the way through, not a result):"
echo "  $out/stage_table.md                 every task after every stage"
echo "  $out/stage_joint/curves.png         loss and metrics of the last stage"
echo "  $out/evaluation/metrics.json        test metrics with 95 % intervals, per_case.csv beside it"
echo "  $out/predictions/*/report.html      what the network says of a slice, to look at; masks and numbers beside it"
