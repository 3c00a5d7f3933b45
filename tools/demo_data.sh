#!/usr/bin/env bash
# tools/demo_data.sh: fills build/demo with what the demo and the tests on real input need, unless it is there:
# SmolLM2-135M-Instruct/ (the model), calib.h5 (128 x 512 tokens) and eval.h5 (64 x 512, other texts).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

demo=build/demo
model=$demo/SmolLM2-135M-Instruct
python=$(tools/python_env.sh)/bin/python

tokenize() {  # STORE TEXT SEQUENCES
  if [ -f "$demo/$1" ]; then echo "$demo/$1 is there already"; return; fi
  "$python" tools/calibrate.py --tokenizer $model --text "$demo/$2" --sequences "$3" --sequence-length 512 \
    --output "$demo/$1"
}

if [ -f $model/config.json ]; then
  echo "$model is there already"
else
  "$python" tools/fetch_demo_model.py $model
fi
tools/demo_text.sh $demo
tokenize calib.h5 calibration.txt 128
tokenize eval.h5 evaluation.txt 64
