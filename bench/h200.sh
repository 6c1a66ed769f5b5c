#!/usr/bin/env bash
# The comparison on one CUDA GPU at Qwen2.5-0.5B's exact shape with random weights: each server alone on the GPU, one after another.
#
#   bench/h200.sh minisgl sglang hf          server benchmark of these systems
#   bench/h200.sh ttfb                       anatomy of minisgl's time to first byte
#   bench/h200.sh local                      in-process comparison
#
# Environment: OUT (results, default bench/results), SGLANG_SITE (a folder with sglang's packages, used for its process alone),
# MODEL (default /tmp/qwen2.5-0.5b-shape), LIMIT (seconds for everything, default 560), PYTHON (default python3), ROUNDS (1),
# DEVICE (cuda), CONCURRENCY (1,8,32,64,256), INPUT_LEN (16,512).
# Results are written as soon as they exist. Servers measured by separate calls are merged while PARTS (default
# /tmp/h200-parts) still holds the earlier ones: `ROUNDS=2 bench/h200.sh minisgl hf`, then `ROUNDS=2 bench/h200.sh sglang ttfb`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-bench/results} parts=${PARTS:-/tmp/h200-parts} model=${MODEL:-/tmp/qwen2.5-0.5b-shape}
python=${PYTHON:-python3} device=${DEVICE:-cuda} end=$((SECONDS + ${LIMIT:-560}))
site=(${SGLANG_SITE:+--sglang-site "$SGLANG_SITE"})
mkdir -p "$out" "$parts"
export PYTHONUNBUFFERED=1

[ -e "$model/config.json" ] ||
  "$python" bench/make_model.py Qwen/Qwen2.5-0.5B-Instruct "$model"

collect() {
  local reports=("$parts"/*.server.json)
  if [ -e "${reports[0]}" ]; then
    "$python" bench/server_bench.py --merge "${reports[@]}" --out "$out" --name server || true
  fi
  tar czf "$out/all.tar.gz" -C "$parts" .
}
trap collect EXIT

for part in "$@"; do
  left=$((end - SECONDS))
  if [ "$left" -lt 90 ]; then
    echo "== $part is left out: only $left s are left"
    continue
  fi
  echo "== $part: $left s left"
  case $part in
    ttfb)
      timeout "$left" "$python" bench/ttfb.py --model "$model" --device "$device" --requests 200 --out "$parts" \
        --plot "$out/ttfb.png" --perfetto "$parts/ttfb.trace.json" --json "$parts/ttfb.json" | tee "$out/ttfb.txt" || true ;;
    local)
      timeout "$left" "$python" bench/local_bench.py --model "$model" --device "$device" "${site[@]}" --out "$parts" --rounds 1 || true
      cp "$parts/local.md" "$out/" || true ;;
    *)
      # The time limit leaves a minute for the run in progress and for stopping the server.
      timeout "$left" "$python" bench/server_bench.py --systems "$part" --model "$model" --device "$device" "${site[@]}" \
        --concurrency "${CONCURRENCY:-1,8,32,64,256}" --input-len "${INPUT_LEN:-16,512}" --output-len 128 --waves 3 --rounds "${ROUNDS:-1}" --hf-max-requests 8 \
        --time-limit $((left - 60)) --out "$parts" --name "$part.server" --title "Server benchmark on one GPU" || true
      collect ;;
  esac
done
