#!/usr/bin/env bash
# Builds wheel and sdist, installs each without extras in an empty environment, and uses it there.
# Usage: tools/try_package.sh PYTHON   (a Python with the package `build`)
set -euo pipefail
python=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf dist
"$python" -m build --outdir dist . > "$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }
constraints=$scratch/constraints.txt  # the lock's versions: a wheel just built has no hash in it
sed -nE 's/^([a-z0-9][^\]*==[^\]*) \\$/\1/p' requirements.lock | cat - constraints.txt > "$constraints"

"$python" -m venv "$scratch/venv"
pip="$scratch/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip -c "$constraints" torch
$pip -c "$constraints" dist/*.whl
export PATH="$scratch/venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
unset PYTHONPATH

try() {
    cd "$scratch"
    fedfora --help > /dev/null
    if python -c "import flwr" 2> /dev/null; then echo "a plain install brought Flower"; exit 1; fi
    fedfora train --model_name_or_path clinic-base --train_file clinic --output_dir run --max_steps 2 \
        --overwrite_output_dir
    fedfora report run
    fedfora predict --model_dir run --test_file clinic:test --max_eval_samples 2 --output_dir answers
    fedfora export --model_dir run --output_dir lora --overwrite_output_dir
    said=$(fedfora simulate --model_name_or_path clinic-base --train_file clinic --num_clients 2 2>&1) && exit 1
    grep -q 'pip install "fedfora\[federated\]"' <<< "$said" || { echo "$said"; exit 1; }
    cd - > /dev/null
}

try
echo "wheel: installs and works without extras"
$pip --no-deps --force-reinstall dist/*.tar.gz
try
echo "sdist: installs and works without extras"
