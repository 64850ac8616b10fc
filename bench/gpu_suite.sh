#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU: one script, at most nine minutes, that leaves what it has.
#
#   bench/gpu_suite.sh [--out DIR] [--budget SECONDS] [--only PART,PART...]
#
# Parts, in this order:
#   build      the extension with its CUDA part
#   first      what kernels, IF nodes, WHILE iterations and grid barriers cost; read and copy bandwidth
#   kernels    every op at the shapes of Llama-3.2-1B, Llama-2-7B and Llama-3-8B, cold, beside torch's own
#   decode     whole steps, dense and 25 % skipped: batch 1, 2, 4, 8; 128, 2,048 and 8,192 positions; beside
#              transformers with a compiled static cache and a CUDA graph of its forward pass
#   modes      predicate and if_node, replay and while, cuda and triton kernels
#   prefetch   bytes brought into the second-level cache ahead of their use
#   test       pytest -m gpu
#   sanitizer  compute-sanitizer memcheck and racecheck on the op tests
# A part that runs out of time is cut off; the parts after it are left out and named. Needs no network and, beyond
# torch, transformers, triton, pybind11, pytest and nvcc, no package.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${OUT:-build/gpu_suite}"
budget=540
parts="build,first,kernels,decode,modes,prefetch,test,sanitizer"
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$2" ;;
        --budget) budget="$2" ;;
        --only) parts="$2" ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
    shift 2
done
for part in ${parts//,/ }; do
    case ",build,first,kernels,decode,modes,prefetch,test,sanitizer," in
        *",$part,"*) ;;
        *) echo "unknown part $part; see the head of $0" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-python3}"
failed=0

wanted() { [[ ",$parts," == *",$1,"* ]]; }
left() { echo $((budget - SECONDS)); }
# attempt PART COMMAND...: within the time left; its output goes to PART.log
attempt() {
    local part="$1" seconds
    shift
    seconds=$(left)
    if [ "$seconds" -lt 5 ]; then
        echo "$part: left out, the time is spent" | tee -a "$out/$part.log"
        failed=1
        return 1
    fi
    echo "== $part: $* (at most $seconds s)" >>"$out/$part.log"
    timeout "$seconds" "$@" >>"$out/$part.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || { echo "$part: exit status $status, see $out/$part.log"; tail -5 "$out/$part.log"; failed=1; }
    return $status
}
bench() { attempt "$1" "$PYTHON" -m skipkernels bench "${@:2}"; }

wanted build && SKIPKERNELS_CUDA=1 attempt build "$PYTHON" setup.py build_ext --inplace
if wanted first; then
    mkdir -p build
    attempt first nvcc -std=c++17 -O3 -arch=native -Icsrc bench/gpu/first_measurements.cu csrc/cuda/graph.cpp \
        csrc/cuda/condition.cu -o build/first_measurements &&
        attempt first bash -c "build/first_measurements >'$out/first.json'"
fi
if wanted kernels; then
    bench kernels kernels --device cuda --kernels cuda --shapes llama-3.2-1b,llama-2-7b,llama-3-8b --layers 8 \
        --batch-sizes 1,4 --kv-lengths 2048 --rounds 3 --json "$out/kernels.json"
fi
if wanted decode; then
    for shapes in llama-3.2-1b llama-2-7b llama-3-8b; do
        bench decode decode --device cuda --kernels cuda --shapes $shapes --prompt-tokens 128 --new-tokens 64 --rounds 3 \
            --against compiled,cuda-graph --json "$out/decode-$shapes.json" --plot "$out/decode-$shapes.png"
    done
    bench decode decode --device cuda --kernels cuda --shapes llama-3.2-1b --batch-sizes 1,2,4,8 --prompt-tokens 128 \
        --new-tokens 48 --rounds 3 --json "$out/decode-batches.json"
    for length in 2048 8192; do
        bench decode decode --device cuda --kernels cuda --shapes llama-3.2-1b --prompt-tokens $length --new-tokens 48 \
            --rounds 3 --json "$out/decode-$length.json"
    done
fi
if wanted modes; then
    for kernels in cuda triton; do
        for conditional in predicate if_node; do
            for loop in replay while; do
                bench modes decode --device cuda --kernels $kernels --conditional $conditional --loop $loop \
                    --shapes llama-3.2-1b --test-only --prompt-tokens 128 --new-tokens 48 --rounds 3 \
                    --json "$out/modes-$kernels-$conditional-$loop.json"
            done
        done
    done
fi
wanted prefetch && attempt prefetch "$PYTHON" bench/gpu/prefetch.py "$out/prefetch.json"
gpu_tests=(-m pytest -q -c bench/gpu/pytest.ini --rootdir=. --confcutdir=tests/gpu -p no:cacheprovider -m gpu)
wanted test && attempt test "$PYTHON" "${gpu_tests[@]}" tests/gpu
if wanted sanitizer; then
    for tool in memcheck racecheck; do
        attempt sanitizer compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" "${gpu_tests[@]}" \
            tests/gpu/test_ops.py -k "cuda and (seed or 0-dtype)" -x
    done
fi
"$PYTHON" bench/gpu/summary.py "$out"
echo "after $SECONDS s; everything is in $out"
exit $failed
