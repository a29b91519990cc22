#!/usr/bin/env bash
# Calls our server with unmodified Triton clients, tritonclient[grpc] and perf_analyzer, in unary,
# streaming, shared-memory and JPEG modes. They are installed in a separate virtual environment,
# because tritonclient's stubs and ours cannot be loaded in one process.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
home=build/conformance
window_ms=${WINDOW_MS:-1000}
mkdir -p "$home"

if [ ! -e "$home/.ready" ]; then
  echo "installing tritonclient and the libraries of its perf_analyzer (once) …"
  rm -rf "$home/venv" && "$python" -m venv "$home/venv"
  "$home/venv/bin/pip" install --quiet 'tritonclient[grpc]==2.46.0' 'numpy<2'
  "$home/venv/bin/pip" install --quiet --no-deps nvidia-cuda-runtime-cu12
  touch "$home/.ready"
fi
if ! ldconfig -p | grep -q 'libb64\.so\.0d' && [ ! -e "$home/libb64" ]; then
  # perf_analyzer needs Debian's libb64; unpacking it here needs no root
  (cd "$home" && { apt-get download -qq libb64-0d || { apt-get update -qq && apt-get download -qq libb64-0d; }; } &&
    dpkg -x libb64-0d_*.deb libb64)
fi
libraries="$(echo "$PWD/$home"/venv/lib/python*/site-packages/nvidia/cuda_runtime/lib)"
if [ -e "$home/libb64" ]; then
  libraries+=":$(dirname "$(find "$PWD/$home/libb64" -name 'libb64.so.0d' | head -1)")"
fi

work=$(mktemp -d)
"$python" -m crl_sdk serve --address 127.0.0.1:0 --bases "$work/bases" --cache-mb 0 --shared-memory \
  >"$work/ready" 2>"$work/log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 300); do
  grep -q '"event": "serving"' "$work/ready" && break
  kill -0 "$server" || { cat "$work/log"; exit 1; }
  sleep 0.1
done
address=$("$python" -c 'import json, sys; print(json.load(sys.stdin)["address"])' <"$work/ready")

"$python" tests/conformance/reference.py "$address" "$work"
"$home/venv/bin/python" tests/conformance/triton_client.py "$address" "$work"

perf() { # arguments: a title, then options of perf_analyzer
  echo
  echo "== perf_analyzer, $1: ${*:2}"
  (cd "$work" && LD_LIBRARY_PATH="$libraries" timeout 120 "$OLDPWD/$home/venv/bin/perf_analyzer" \
    -i grpc -u "$address" -p "$window_ms" -s 1000 -r 3 "${@:2}") | tee "$work/table" |
    sed -n '/^Request concurrency/,$p'
  grep -q 'throughput: [1-9]' "$work/table" || { cat "$work/table" "$work/log"; exit 1; }
}
perf "JPEG" -m crl.color --input-data jpeg.json
perf "pixels, unary" -m crl-pixels.color --shape PIXELS:96,96,3 --concurrency-range 1:4:3
perf "pixels, batches in system shared memory" -m crl-pixels.color --shape PIXELS:96,96,3 -b 4 --shared-memory system
perf "JPEG, streaming" -m crl.color --input-data jpeg.json --streaming
perf "stored embeddings" -m crl-embedding.color
echo
if command -v npm >/dev/null; then
  echo "== Node.js, with proto/ only"
  rm -rf "$home/node" && cp -r examples/node "$home/node" && sed -i "s#../../proto#../../../proto#" "$home/node/embed.mjs"
  (cd "$home/node" && npm install --silent --no-audit --no-fund >/dev/null &&
    node embed.mjs "$address" color "$work"/0.jpg "$work"/log) | tee "$work/node"
  grep -q '0.jpg.*\(red\|green\|blue\|yellow\)$' "$work/node" && grep -q 'not a readable image' "$work/node"
else
  echo "== Node.js: skipped, because npm is not installed"
fi
echo "== bindings of enterprise TensorRT, over empty libraries"
"$python" tests/conformance/tensorrt_bindings.py
"$python" tests/conformance/tensorrt_plugin.py
echo
echo "conformance: tritonclient and perf_analyzer 2.46.0, all modes passed"
