#!/bin/sh
# make gpu: the tests and timings that need a CUDA device, with the interpreter at hand when its
# torch sees one (nothing is installed), else with the project's own environment. All of it takes
# less than eight minutes. First all tests, in some processes at once, while others compile what is
# timed next; then operators, then presets, alone on the device. Each phase begins nothing new when
# its time is up, is ended soon after, and leaves in docs/benchmarks what it has measured; a phase
# that fails does not keep the next from running.
cd "$(dirname "$0")/../.." || exit 1
start=$(date +%s)
left() { # seconds until $1 before the end, at least 1
    seconds=$((480 - $1 - $(date +%s) + start))
    echo $((seconds > 1 ? seconds : 1))
}
# Kernels and models need no more than this.
missing='import importlib.util, sys, torch
if not torch.cuda.is_available():
    sys.exit(1)
needed = "numpy", "triton", "pytest"
print(*(name for name in needed if importlib.util.find_spec(name) is None))'
lacking=
found=
for python in "$PYTHON" "$BIN/python"; do
    absent=$("$python" -c "$missing" 2>/dev/null) || continue
    [ -z "$absent" ] && found=$python && break
    lacking="$lacking $python sees one but lacks: $absent."
done
if [ -z "$found" ] && [ -n "$lacking" ]; then
    echo "make gpu: nothing was run, for want of packages beside a CUDA device:$lacking" >&2
    exit 1
fi
if [ -z "$found" ]; then
    echo "make gpu: no CUDA device here; nothing was run"
    exit 0
fi

export PYTHONPATH=.typing
logs=$(mktemp -d) || exit 1
jobs=
trap 'rm -rf "$logs"' EXIT
trap 'kill $jobs 2>/dev/null; exit 130' INT TERM
begin() { # runs in the background, for as long as tests may take; $1 is the name of its log
    name=$1
    shift
    (
        timeout -k 5 "$(left 300)" "$found" "$@" > "$logs/$name" 2>&1 &
        trap "kill $!" TERM
        wait $!
        echo $? > "$logs/$name.code"
    ) &
    jobs="$jobs $!"
}
alone() { # runs for $1 seconds at most, and waits in a way that a signal ends
    timeout -k 5 "$1" "$found" -m "$2" $3 &
    jobs=$!
    wait "$jobs" || code=1
}
until=$(left 310)
kernels=
for file in tests/kernels/test_triton_*.py tests/kernels/test_expert_rows.py; do
    case $file in
        *_compile.py | *_code.py) ;; # need no device
        *) kernels="$kernels $file" ;;
    esac
done
# The delta rule by itself: a kernel that reads what is not there ends the device's context, and
# with it all tests that follow in its process; its kernels are also most of what is compiled.
names=
tests() { # $1 names the log, $2 says which tests
    log=$1
    asked=$2
    shift 2
    begin "$log" tests/gpu/until.py "$until" "$@" -k "$asked"
    names="$names $log"
}
for part in 1 2 3 4; do
    tests "mixers$part" "not delta" "--share=$part/4" tests/gpu/test_mixers.py
done
tests operators "not delta" tests/gpu/test_cuda.py
tests long "not delta" tests/gpu/test_attention.py tests/gpu/test_long.py
tests kernels "not delta" $kernels
tests delta_mixers delta tests/gpu/test_mixers.py
tests delta_operators delta tests/gpu/test_cuda.py tests/gpu/test_long.py
tests delta_kernels delta $kernels
export FLA_CACHE_RESULTS=0 # what fla finds fastest on a busy device is not to be kept
begin compile -m rondo.kernels.bench --compile --seconds "$until"
unset FLA_CACHE_RESULTS # it tunes again, alone, when it is timed
wait
code=0
for log in $names; do
    ended=$(cat "$logs/$log.code")
    echo "== tests: $log"
    cat "$logs/$log"
    case $ended in
        0) ;;
        2 | 124 | 137) code=1 && echo "make gpu: these tests did not end in time" ;;
        *) code=1 ;;
    esac
done
echo "== operators"
cat "$logs/compile"
alone "$(left 105)" rondo.kernels.bench "--seconds $(left 115)"
echo "== presets"
if "$found" -c "import yaml" 2>/dev/null; then
    alone "$(left 6)" rondo.pretrain.bench_presets "--rounds 3 --seconds $(left 14)"
else
    echo "make gpu: presets are YAML, which $found cannot read (pip install pyyaml): left out"
fi
exit $code
