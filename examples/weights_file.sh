#!/usr/bin/env bash
# A network trained elsewhere, as a file of weights, on the command line: weights_file.sh DIR (one folder per class).
set -euo pipefail

images=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Stands for your own training: any state_dict of a torchvision ResNet18, as .pt or .safetensors.
python - "$images" "$work/resnet18.pt" <<'PYTHON'
import sys, torch, torchslice as ts
task = ts.data.load(f"folder:{sys.argv[1]}", image_size=32, workers=0)
model = ts.models.create("torchvision:resnet18", num_classes=len(task.classes))
ts.fit(model, task, ts.Training(epochs=1, batch_size=64, learning_rate=0.02))
torch.save(model.state_dict(), sys.argv[2])
PYTHON

options=(--data-option image_size=32 --data-option workers=0)
torchslice extract torchvision:resnet18 "folder:$images" --weights "$work/resnet18.pt" "${options[@]}" \
    --classes digit1,digit4,digit7 --finetune 1 --out "$work/three.safetensors"
torchslice evaluate "$work/three.safetensors" "folder:$images" "${options[@]}"
