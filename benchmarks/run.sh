#!/usr/bin/env bash
# Measures on the GPUs of this machine what benchmarks/results holds, one chain of runs a GPU, and leaves what is not finished in time.
#
#   benchmarks/run.sh [OUT] [NAME...]      OUT: a folder, default benchmarks/results; NAME: some of the runs below, default all
#
# Install saccade with the extras bench, train and report first, and run it from the repository's root. A run that the limit cuts short
# keeps its finished cases: every file says whether it is complete.
set -uo pipefail
out=${1:-benchmarks/results}
shift || true
wanted=" $* "
mkdir -p "$out"
gpus=$(nvidia-smi --list-gpus | wc -l)
[ "$gpus" -gt 0 ] || { echo "there is no GPU here" >&2; exit 1; }
prefix=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-' | sed 's/^nvidia-//')
saccade=${SACCADE:-saccade}

# name | seconds | arguments of saccade bench
runs() {
  cat <<'RUNS'
scan-backward|300|scan --grid full --case "lightning forward+backward" --case "scalar gate forward+backward" --case "vector gate forward+backward" --case "delta forward+backward" --case "gated delta forward+backward" --case "kda forward+backward"
bars-step|180|step --grid bars --case attention
whole-quest-128k|90|step --whole --methods "quest(reduce='group_max')" --lengths 131072 --batches 1 --layers 32
whole-snapkv-32k|90|step --whole --methods "snapkv(budget=0.25)" --lengths 32768 --batches 8 --layers 32
whole-zipcache-32k|90|step --whole --methods "zipcache(salient_bits=4, other_bits=4)" --lengths 32768 --batches 8 --layers 32
full-attend|300|attend --grid full
full-decode|150|decode --grid full
full-scan|330|scan --grid full
full-estimate|90|estimate --grid full
full-quant|90|quant --grid full
prefill-32k|120|prefill --lengths 32768
prefill-128k|240|prefill --lengths 131072
bars-mixer|90|mixer --grid bars
mixer-deltanet|60|mixer --methods "deltanet;kimi-linear" --lengths 8192,131072
mixer-decode|60|mixer --grid bars --case "decoding step"
RUNS
}

chain() { # the runs of one GPU
  local number=0 name limit arguments
  while IFS='|' read -r name limit arguments; do
    [ -z "${wanted// /}" ] || [[ $wanted == *" $name "* ]] || continue
    if [ $((number++ % gpus)) -eq "$1" ]; then
      echo "GPU $1: $name, $limit s"
      eval "CUDA_VISIBLE_DEVICES=$1 timeout $((limit + 30)) $saccade bench $arguments --device cuda --dtype bfloat16 --limit $limit" \
        "--json '$out/$prefix-$name.json'" > "$out/$name.log" 2>&1 || echo "GPU $1: $name ended with an error, see $out/$name.log"
    fi
  done < <(runs)
}

for gpu in $(seq 0 $((gpus - 1))); do chain "$gpu" & done
wait
