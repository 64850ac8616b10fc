#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU: one script, at most nine minutes, that leaves what it has.
#
#   bench/gpu_suite.sh [--out DIR] [--seconds SECONDS] [--only PART,PART...] [--dry-run] [--peers NAME,NAME...]
#
# Parts, in this order, with their shares of the time:
#   versions   card, driver, versions, commit
#   build      the extension, for this GPU alone
#   first      what kernels, IF nodes, WHILE iterations and grid barriers cost; read and copy bandwidth; how two kernels
#              overlap
#   ops        the CUDA kernels against the reference, up to the first failure
#   tokens     a generation of Llama-3.2-1B's shapes for every conditional and loop: the same tokens
#   decode     whole steps, dense and 25 % skipped: 1B, 7B, 8B; batch 1 and 4; 128, 2,048 and 8,192 positions
#   kernels    every op at the shapes of 1B and 7B, cold, beside torch's own
#   blocks     matrices of blocks (q8_0, q4_0, q4_k): every op and whole steps, dense and 25 % skipped, batch 1 and 4
#   neurons    the ops that leave neurons out at several lengths of their list, and whole steps, at 1B and 8B
#   timeline   when each kernel of a step begins, has waited and ends
#   switches   a step with each of the kernels' options switched off, and with other bounds of the prefetch
#   memcheck   compute-sanitizer on a few op tests
#   peers      transformers with a compiled static cache, and a CUDA graph of its forward pass, on 1B alone
#   engine     the engine's tests with the CUDA kernels
#   triton     the tests of the Triton kernels, with the time that is left
# Each part has a limit of its own, and one that fails or hangs costs the others nothing. Every row is in DIR/rows.jsonl
# as soon as it is measured, every output in DIR/suite.log; DIR/suite.json and DIR/summary.txt are made of them at the
# end. --dry-run goes through all of it without a GPU, at tiny sizes, on the CPU and on the tests' fake CUDA runtime.
#
# Needs no network and, beyond torch, transformers, triton, pybind11, pytest and nvcc, no package.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all="versions,build,first,ops,tokens,decode,kernels,blocks,neurons,timeline,switches,memcheck,peers,engine,triton"
out="${OUT:-build/gpu_suite}" total=540 parts="$all" dry="" peers="compiled,cuda-graph"
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry="--dry-run"; shift; continue ;;
        --out | --seconds | --only | --peers)
            [ $# -ge 2 ] || { echo "$1 needs a value; see the head of $0" >&2; exit 2; } ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
    case "$1" in
        --out) out="$2" ;;
        --seconds) total="$2" ;;
        --only) parts="$2" ;;
        --peers) peers="$2" ;;
    esac
    shift 2
done
for part in ${parts//,/ }; do
    [[ ",$all," == *",$part,"* ]] || { echo "unknown part $part; there are $all" >&2; exit 2; }
done
[[ "$total" =~ ^[0-9]+$ ]] || { echo "--seconds takes a whole number, got $total" >&2; exit 2; }

mkdir -p "$out"
rows="$out/rows.jsonl" log="$out/suite.log"
: >"$rows"
: >"$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export SKIPKERNELS_CUDA=1 SKIPKERNELS_CUDA_ARCH=native
PYTHON="${PYTHON:-python3}"
failed=0

# part NAME SECONDS COMMAND...: if it is wanted. SECONDS are of 540; what a part leaves over goes to the last ones.
part() {
    local name="$1" limit=$(($2 * total / 540)) left=$((total - SECONDS - 3)) began=$SECONDS status
    shift 2
    [[ ",$parts," == *",$name,"* ]] || return 0
    [ "$limit" -gt 0 ] && [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "{\"part\": \"$name\", \"left_out\": \"the time is spent\"}" >>"$rows"
        echo "$name: left out, the time is spent"
        failed=1
        return 0
    fi
    echo "== $name, at most $limit s: $*" >>"$log"
    LIMIT=$limit timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    echo "{\"part\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began)), \"limit\": $limit}" >>"$rows"
    echo "$name: $((SECONDS - began)) s, exit status $status"
    [ $status -eq 0 ] && return 0
    failed=1
    tail -n 5 "$log" | cut -c 1-200
}
measure() { part "$1" "$2" "$PYTHON" bench/gpu/measure.py "$1" --rows "$rows" $dry "${@:3}"; }
gpu_tests=("$PYTHON" -m pytest -q -c bench/gpu/pytest.ini --rootdir=. --confcutdir=tests/gpu -p no:cacheprovider -m gpu)
sanitizer=(compute-sanitizer --tool memcheck --error-exitcode 9)
build=("$PYTHON" setup.py build_ext --inplace)
first=(bash bench/gpu/first.sh "$rows")
if [ -n "$dry" ]; then
    gpu_tests+=(--collect-only) sanitizer=() build=("$PYTHON" setup.py --version) first+=(--dry-run)
fi

measure versions 15
part build 50 "${build[@]}"
part first 30 "${first[@]}"
part ops 60 "${gpu_tests[@]}" tests/gpu/test_ops.py -k cuda -x
measure tokens 30
measure decode 90
measure kernels 40
measure blocks 45
measure neurons 30
measure timeline 20
measure switches 45
part memcheck 40 ${sanitizer[@]+"${sanitizer[@]}"} "${gpu_tests[@]}" tests/gpu/test_ops.py -k "cuda and seed0" -x
measure peers 60 --peers "$peers"
part engine 60 "${gpu_tests[@]}" tests/gpu/test_engine.py -k cuda
part triton 0 "${gpu_tests[@]}" tests/gpu -k triton

"$PYTHON" bench/gpu/summary.py "$out" | tee "$out/summary.txt"
echo "after $SECONDS s; everything is in $out"
exit $failed
