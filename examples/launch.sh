#!/usr/bin/env bash
# A server that prunes where it pays: examples/launch.sh MODEL [more flags of sglang.launch_server]
set -euo pipefail
model=${1:?usage: examples/launch.sh MODEL [flags]}
shift
claa-sglang doctor -- --model-path "$model" --enable-claa "$@"    # says what is missing before anything is loaded
exec python -m sglang.launch_server --model-path "$model" --enable-claa --enable-metrics "$@"
