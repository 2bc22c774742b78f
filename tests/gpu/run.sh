#!/bin/sh
# make gpu: the tests and timings that need a CUDA device, with the interpreter at hand when its
# torch sees one (nothing is installed), else with the project's own environment. All of it takes
# less than eight minutes: tests are interrupted after four, and timings, which lie in
# docs/benchmarks then, begin nothing new when what is left has to suffice for what follows.
cd "$(dirname "$0")/../.." || exit 1
start=$(date +%s)
left() { # seconds until $1 before the end, at least 1
    seconds=$((480 - $1 - $(date +%s) + start))
    echo $((seconds > 1 ? seconds : 1))
}
# Kernels and models need no more than this; presets are YAML.
missing='import importlib.util, sys, torch
if not torch.cuda.is_available():
    sys.exit(1)
needed = "numpy", "triton", "pytest", "yaml"
print(*(name for name in needed if importlib.util.find_spec(name) is None))'
lacking=
for python in "$PYTHON" "$BIN/python"; do
    absent=$("$python" -c "$missing" 2>/dev/null) || continue
    if [ -n "$absent" ]; then
        lacking="$lacking $python sees one but lacks: $absent."
        continue
    fi
    export PYTHONPATH=.typing
    timeout -s INT 240 "$python" -m pytest tests/gpu tests/kernels/test_triton_*.py tests/kernels/test_expert_rows.py
    tests=$?
    "$python" -m rondo.kernels.bench --seconds "$(left 200)" \
        && "$python" -m rondo.pretrain.bench_presets --seconds "$(left 70)" && exit $tests
    exit 1
done
if [ -n "$lacking" ]; then
    echo "make gpu: nothing was run, for want of packages beside a CUDA device:$lacking" >&2
    exit 1
fi
echo "make gpu: no CUDA device here; nothing was run"
