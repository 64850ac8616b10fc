#!/usr/bin/env bash
# Compiles first_measurements.cu and appends what it prints, one JSON object a line, to the file given.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
rows="$1"
sources="bench/gpu/first_measurements.cu csrc/cuda/graph.cpp csrc/cuda/device.cpp csrc/cuda/condition.cu"
if [ "${2:-}" = "--dry-run" ]; then
    exec "${PYTHON:-python3}" bench/gpu/dry_run.py "$rows" $sources
fi
mkdir -p build
nvcc -std=c++17 -O3 -arch=native -Icsrc $sources -o build/first_measurements
build/first_measurements >>"$rows"
