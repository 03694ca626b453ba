#!/usr/bin/env bash
# The runs behind benchmarks/results on one H200: bash benchmarks/h200.sh OUT PART... (parts: see PARTS).
# A part takes some minutes, writes its JSON to OUT and leaves nothing running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$1
shift
mkdir -p "$OUT"
MODEL=${MODEL:-.cache/models/smollm2-135m-instruct} # `make model`
SERVERS=${SERVERS:-3}                               # one small model does not fill a GPU
PROFILE=claa_sglang/profiles/smollm2-135m-instruct.json
STEPS=18:0.7:17+18,21:0.3:21 # what `calibrate --steps 2` chose with kernel 13: docs/notes/calibration.md
CLAA=(python3 -m claa_sglang.cli) # its command may not be on PATH
TTFT=(python3 -m benchmarks.bench_ttft ${BUDGET:+--budget-seconds "$BUDGET"} --shape llama-3.1-8b) # seconds a part may take

ttft() { "${TTFT[@]}" --scenarios cold second-turn burst shared-prefix mixed --out "$OUT/ttft_h200.json"; }

dense() {
    "${TTFT[@]}" --control --scenarios cold dense growing-chat --lengths 10240 --dense-lengths 512 10240 32768 \
        --budget-seconds 400 --out "$OUT/dense_h200.json"
}

bound() { # more rounds where the bound was missed by less than engines differ by
    "${TTFT[@]}" --control --scenarios cold --lengths 10240 --rounds 25 --out "$OUT/bound_h200.json"
}

rested() { # the same, each request on a GPU that rested
    "${TTFT[@]}" --control --scenarios cold --lengths 10240 --rounds 25 --rest 0.5 --out "$OUT/rested_h200.json"
}

first() { # what the plugin adds where no kernel was ever compiled, and once they are
    local fresh
    fresh=$(mktemp -d)
    for start in first again; do
        TRITON_CACHE_DIR=$fresh "${TTFT[@]}" --scenarios dense --engines claa --dense-lengths 512 --rounds 1 \
            --out "$OUT/start_${start}_h200.json"
    done
}

small() { # a model that a GPU computes faster than Python launches it: to be left dense
    python3 -m benchmarks.bench_ttft --model "$MODEL" --scenarios cold growing-chat --lengths 1024 2048 4096 7936 \
        --chat 256 7936 30 --out "$OUT/small_h200.json"
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
    python3 -m benchmarks.backends --model "$MODEL" --answers-only --schedule 15:0.4,23:0.15 \
        --out "$OUT/schedule_h200.json"
}

traced() { # what the prefill spends its time on
    python3 -m benchmarks.backends --model "$MODEL" --backends fa3 --out "$OUT/traced_h200.json"
}

startup() { "${TTFT[@]}" --scenarios startup --out "$OUT/startup_h200.json"; }

kernels() { python3 -m pytest -q -p no:cacheprovider -m gpu tests/gpu; }

quality() { # prompts that had no part in choosing the profile
    prompts 31
    served profile quality_h200 "--claa-profile $PROFILE" \
        --rankers claa claa:heads=sum claa:zscore=off last-query fastkv gemfilter --keep-rates 0.1 0.2 0.3 0.4
}

widths() { # prompts by which the profile's pooling width was chosen
    prompts 7
    served widths quality_widths_h200 "--claa-prune-layer 21 --claa-score-layers 21, --claa-pool-kernel 13" \
        --rankers claa claa:kernel=7 claa:kernel=21 fastkv gemfilter uniform --keep-rates 0.1 0.2 0.3 0.4 --time
}

layers() { # the paper's aggregation: four layers up to the same prune, where the profile has one
    prompts 31
    served layers quality_layers_h200 "--claa-prune-layer 21 --claa-score-layers 18,19,20,21 --claa-pool-kernel 21" \
        --keep-rates 0.1 0.2 0.3 0.4
}

steps() { # two prunes, which no request can ask for: servers of their own
    prompts 7
    served steps quality_steps_h200 "--claa-pool-kernel 13 --claa-schedule $STEPS" --keep-rates 0.5 0.7 0.9 --time
}

steps21() { # the same over the profile's width
    prompts 31
    served steps21 quality_steps21_h200 "--claa-pool-kernel 21 --claa-schedule $STEPS" --keep-rates 0.7
}

default() { # what CLAA does without a profile
    prompts 7
    served default quality_default_h200 "" --rankers claa
}

oracle() { # the oracle's own ranking beside the others, on fewer prompts: the model must answer each of them first
    local prompts=${ORACLE_PROMPTS:-$OUT/oracle_prompts.jsonl.xz} dir=$OUT/oracle
    [[ -e $prompts ]] || "${CLAA[@]}" tasks --model "$MODEL" --token-ids --lengths 1000 4000 --seed 41 \
        --sources prose repeated --count 6 --out "$prompts"
    # No smaller model has this tokenizer: it is its own draft.
    "${CLAA[@]}" rank-report --model "$MODEL" --prompts "$prompts" --rankers claa --score-layers 1 --draft "$MODEL" \
        --out "$dir" || return
    python3 -m benchmarks.eval_quality "$prompts" --engine "$MODEL" --profile "$PROFILE" \
        --rankers claa last-query fastkv gemfilter uniform \
        --given oracle="$dir/oracle.jsonl" specprefill="$dir/specprefill.jsonl" --keep-rates 0.1 0.2 0.3 0.4 \
        --out "$OUT/quality_oracle_h200.json"
}

# SEED: sets PROMPTS, to PROMPTS_FILE where given: 200 for each task and length; common words have no source. (Of the
# committed results of seed 7, half of the common words were of seed 107, and quality_default_h200 has none of these.)
prompts() {
    PROMPTS=${PROMPTS_FILE:-$OUT/prompts_$1.jsonl.xz}
    [[ -e $PROMPTS ]] && return
    local how=(--model "$MODEL" --token-ids --lengths 1000 2000 4000 7900 --seed "$1") made
    made=$(mktemp -d)
    "${CLAA[@]}" tasks "${how[@]}" --sources prose repeated --count 100 --out "$made/a.jsonl" --tasks needle-number \
        needle-word needle-uuid multi-key multi-value multi-query tracking passages
    "${CLAA[@]}" tasks "${how[@]}" --tasks common-words --count 200 --out "$made/b.jsonl"
    cat "$made"/*.jsonl | xz >"$PROMPTS"
}

# NAME FILE FLAGS ARGUMENTS...: servers with these flags and without a profile unless they name one, asked by eval_quality with these arguments, which takes minutes
# to count after SECONDS_FOR_QUALITY seconds of asking.
served() {
    local name=$1 file=$2 flags=$3 ports port urls=()
    shift 3
    # Ports that are free: a server of another configuration must not answer in place of one that could not start.
    read -ra ports < <(python3 -c "import socket
held = [socket.create_server(('127.0.0.1', 0)) for _ in range($SERVERS)]
print(*(one.getsockname()[1] for one in held))")
    for port in "${ports[@]}"; do
        # shellcheck disable=SC2086
        setsid python3 -m sglang.launch_server --model-path "$MODEL" --port "$port" --enable-claa \
            --claa-profile none $flags --claa-policy always --claa-min-prompt-tokens 0 --max-total-tokens 600000 --mem-fraction-static 0.95 \
            --chunked-prefill-size 8192 --max-running-requests 256 --skip-server-warmup \
            --sleep-on-idle --log-level error >"$OUT/$name.${#urls[@]}.log" 2>&1 &
        running+=($!)
        urls+=("http://127.0.0.1:$port")
    done
    local status=1 end server
    for server in "${!urls[@]}"; do
        until python3 -c "import sys, urllib.request as u; u.urlopen('${urls[server]}/health', timeout=5)" 2>/dev/null; do
            kill -0 "${running[server]}" 2>/dev/null || { tail -30 "$OUT/$name.$server.log"; stop_servers; return 1; }
            sleep 2
        done
    done
    end=$((SECONDS + ${SECONDS_FOR_QUALITY:-480}))
    # Answers are kept as they come, so a run that failed goes on.
    for _ in 1 2 3; do
        python3 -m benchmarks.eval_quality "$PROMPTS" --url "${urls[@]}" --in-flight $((128 * SERVERS)) \
            --kl-prompts 25 --seconds $((end - SECONDS)) --out "$OUT/$file.json" "$@"
        status=$?
        ((status == 0)) && break
    done
    stop_servers
    return $status
}

running=() # process groups of servers
stop_servers() {
    for pid in "${running[@]}"; do kill -9 -- "-$pid" 2>/dev/null; done
    wait "${running[@]}" 2>/dev/null # says nothing of the kill
    running=()
}
trap stop_servers EXIT # also where a time limit ends a part
trap 'exit 143' TERM INT

PARTS=" ttft dense bound rested first small decode decode64 rates startup backends schedule traced kernels quality widths \
layers steps steps21 oracle default "
for part in "$@"; do
    [[ $PARTS == *" $part "* ]] || { echo "no part $part; there are:$PARTS" >&2; exit 2; }
done
for part in "$@"; do
    echo "== $part, $(date +%T)"
    $part || echo "== $part: exit status $?"
done
