#!/usr/bin/env bash
# The runs behind benchmarks/results on one H200: bash benchmarks/h200.sh OUT PART... (parts: see PARTS).
# A part takes some minutes, writes its JSON to OUT and leaves nothing running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$1
shift
mkdir -p "$OUT"
MODEL=${MODEL:-.cache/models/smollm2-135m-instruct} # `make model`
PROMPTS=${PROMPTS:-$OUT/prompts.jsonl.xz}           # made if it is not there
SERVERS=${SERVERS:-3}                               # one small model does not fill a GPU
PROFILE=claa_sglang/profiles/smollm2-135m-instruct.json
STEPS=18:0.7:17+18,21:0.3:21 # what `calibrate --steps 2 --pool-kernel 13` chose: docs/calibration.md
CLAA=(python3 -m claa_sglang.cli) # its command may not be on PATH
TTFT=(python3 -m benchmarks.bench_ttft --shape llama-3.1-8b)

ttft() { "${TTFT[@]}" --scenarios cold second-turn burst shared-prefix mixed --out "$OUT/ttft_h200.json"; }

dense() {
    "${TTFT[@]}" --control --scenarios cold dense growing-chat --lengths 10240 --dense-lengths 512 10240 32768 \
        --budget-seconds 400 --out "$OUT/dense_h200.json"
}

bound() { # more rounds where the bound was missed by less than engines differ by
    "${TTFT[@]}" --control --scenarios cold --lengths 10240 --rounds 25 --out "$OUT/bound_h200.json"
}

decode() { # 64K fits on one GPU for one engine at a time
    "${TTFT[@]}" --scenarios decode --decode-lengths 32768 --engines stock claa --out "$OUT/decode_32k_h200.json"
}

decode64() {
    "${TTFT[@]}" --scenarios decode --decode-lengths 65536 --one-at-a-time --engines stock claa \
        --out "$OUT/decode_64k_h200.json"
}

# SGLang's benchmark client wants the datasets package.
rates() { "${TTFT[@]}" --scenarios rates --out "$OUT/rates_h200.json"; }

backends() { python3 -m benchmarks.backends --model "$MODEL" --out "$OUT/backends_h200.json"; }

schedule() {
    python3 -m benchmarks.backends --model "$MODEL" --backends fa3 --schedule 15:0.4,23:0.15 \
        --out "$OUT/schedule_h200.json"
}

startup() { "${TTFT[@]}" --scenarios startup --out "$OUT/startup_h200.json"; }

kernels() { python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu; }

quality() {
    [[ -e $PROMPTS ]] || "${CLAA[@]}" tasks --model "$MODEL" --token-ids --lengths 1000 2000 4000 7900 --seed 7 \
        --sources prose repeated --count 100 --out "$PROMPTS"
    served profile quality_h200 "--claa-profile $PROFILE" \
        --rankers claa claa:kernel=7 claa:kernel=13 fastkv gemfilter uniform --keep-rates 0.1 0.2 0.3 0.4 --time
}

steps() { # two prunes, which no request can ask for: servers of their own
    served steps quality_steps_h200 "--claa-pool-kernel 13 --claa-schedule $STEPS" \
        --keep-rates 0.5 0.7 0.9 --time
}

oracle() { # the oracle's own ranking beside the others, on fewer prompts: the model must answer each of them first
    local prompts=${ORACLE_PROMPTS:-$OUT/oracle_prompts.jsonl.xz} dir=$OUT/oracle
    [[ -e $prompts ]] || "${CLAA[@]}" tasks --model "$MODEL" --token-ids --lengths 1000 4000 --seed 11 \
        --sources prose repeated --count 6 --out "$prompts"
    "${CLAA[@]}" rank-report --model "$MODEL" --prompts "$prompts" --rankers claa --score-layers 1 --out "$dir" || return
    python3 -m benchmarks.eval_quality "$prompts" --engine "$MODEL" --profile "$PROFILE" --time \
        --rankers claa last-query fastkv gemfilter uniform --given oracle="$dir/oracle.jsonl" \
        --out "$OUT/quality_oracle_h200.json"
}

default() { # what CLAA does without a profile
    served default quality_default_h200 "" --rankers claa
}

# NAME FILE FLAGS ARGUMENTS...: servers with these flags, asked by eval_quality with these arguments.
served() {
    local name=$1 file=$2 flags=$3 pids=() urls=()
    shift 3
    for ((i = 0; i < SERVERS; i++)); do
        # shellcheck disable=SC2086
        setsid python3 -m sglang.launch_server --model-path "$MODEL" --port $((31000 + i)) --enable-claa $flags \
            --claa-policy always --claa-min-prompt-tokens 0 --max-total-tokens 600000 --mem-fraction-static 0.95 \
            --chunked-prefill-size 8192 --max-running-requests 256 --skip-server-warmup \
            --sleep-on-idle --log-level error >"$OUT/$name.$i.log" 2>&1 &
        pids+=($!)
        urls+=("http://127.0.0.1:$((31000 + i))")
    done
    for ((i = 0; i < SERVERS; i++)); do
        until python3 -c "import sys, urllib.request as u; u.urlopen('${urls[i]}/health', timeout=5)" 2>/dev/null; do
            kill -0 "${pids[i]}" 2>/dev/null || { tail -30 "$OUT/$name.$i.log"; break 2; }
            sleep 2
        done
    done
    local status=1 end=$((SECONDS + ${SECONDS_FOR_QUALITY:-480}))
    # Answers are kept as they come, so a run that failed goes on.
    for _ in 1 2 3; do
        python3 -m benchmarks.eval_quality "$PROMPTS" --url "${urls[@]}" --in-flight $((128 * SERVERS)) \
            --kl-prompts 25 --seconds $((end - SECONDS)) --out "$OUT/$file.json" "$@"
        status=$?
        ((status == 0)) && break
    done
    for pid in "${pids[@]}"; do kill -9 -- "-$pid"; done
    wait "${pids[@]}" 2>/dev/null # says nothing of the kill
    return $status
}

PARTS=" ttft dense bound decode decode64 rates startup backends schedule kernels quality steps oracle default "
for part in "$@"; do
    [[ $PARTS == *" $part "* ]] || { echo "no part $part; there are:$PARTS" >&2; exit 2; }
done
for part in "$@"; do
    echo "== $part, $(date +%T)"
    $part || echo "== $part: exit status $?"
done
