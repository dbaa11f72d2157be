#!/usr/bin/env bash
# All benchmarks of training in one go:  benchmarks/all.sh cpu|cuda SMALL LARGE
#
# SMALL: a folder of small JPEGs (32 px), LARGE: one of ordinary photographs, each with one folder a class.
# About 25 minutes on 2 CPU cores; written to take under 10 on an H100 (not yet run there).
# On CUDA first what must be right: the tests that need a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
device=$1 small=$2 large=$3 python=${PYTHON:-python}

if [ "$device" = cuda ]; then
  "$python" -m pytest tests/test_speed.py tests/test_loader.py tests/test_nearest_neighbors.py tests/test_trajectory.py
  "$python" benchmarks/step.py --device cuda --task vits16 --runs 3
  "$python" benchmarks/loss.py --device cuda --images 256 --runs 3
  "$python" benchmarks/pipeline.py "$large" --device cuda --task vits16 --batch 256 --images 8192 --runs 3
  "$python" benchmarks/train.py "$large" --device cuda --task vits16 --steps 10 --runs 3
  "$python" benchmarks/scaling.py --device cuda --runs 3
else
  "$python" benchmarks/products.py
  "$python" benchmarks/step.py --task vits16 --runs 3
  "$python" benchmarks/ablation.py --runs 3
  "$python" benchmarks/ablation.py --runs 3 --busy --only all GOMP_SPINCOUNT=1000
  "$python" benchmarks/loss.py --runs 3
  "$python" benchmarks/pipeline.py "$small" --task tiny4 --runs 3
  "$python" benchmarks/pipeline.py "$large" --task vits16 --batch 16 --images 256 --runs 3 --name pipeline-224
  "$python" benchmarks/train.py "$small" --task tiny4 --runs 3
  "$python" benchmarks/scaling.py --runs 3
fi
