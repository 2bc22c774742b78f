#!/bin/sh
# make gpu: the tests and timings that need a CUDA device, with the interpreter at hand when its
# torch sees one (nothing is installed), else with the project's own environment. Timings of
# operators stop after about three minutes; all lie in docs/benchmarks then.
cd "$(dirname "$0")/../.." || exit 1
sees_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
for python in "$PYTHON" "$BIN/python"; do
    if "$python" -c "$sees_gpu" 2>/dev/null; then
        export PYTHONPATH=.typing
        "$python" -m pytest tests/gpu tests/kernels/test_triton_*.py tests/kernels/test_expert_rows.py
        tests=$?
        "$python" -m rondo.kernels.bench && "$python" -m rondo.pretrain.bench_presets && exit $tests
        exit 1
    fi
done
echo "make gpu: no CUDA device here; nothing was run"
