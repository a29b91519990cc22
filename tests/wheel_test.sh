#!/usr/bin/env bash
# Builds the wheel, installs it with the `cpu` extra into an empty environment, and there opens the
# shipped bundle and embeds an image, with torch absent; then the same with the oldest Python that
# is supported, where there is one.
set -euo pipefail
python=$(realpath --no-symlinks "${PYTHON:?name the interpreter that builds}")
oldest=${OLDEST_PYTHON:-python3.10}
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git -C "$repository" ls-files -z --cached --others --exclude-standard |
  (cd "$repository" && xargs -0 cp --parents -t "$work") # build outside the tree
"$python" -m build --wheel --outdir "$work/dist" "$work" >"$work/build.log" 2>&1 ||
  { tail -20 "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
echo "$(basename "$wheel"): $(stat -c %s "$wheel") bytes"
cd /

try() { # interpreter, then options of pip
rm -rf "$work/venv"
"$1" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "${@:2}" "$wheel[cpu]"
"$work/venv/bin/python" --version
"$work/venv/bin/python" -W error - <<'PYTHON'
import importlib.util
import sys

import numpy as np

import crl_sdk

assert "site-packages" in crl_sdk.__file__, crl_sdk.__file__
assert importlib.util.find_spec("torch") is None, "torch must be absent here"
with crl_sdk.Embedder.open(crl_sdk.demo_bundle()) as embedder:
    embedder.create_basis("color", ["red", "green", "blue"])
    image = np.full((80, 80, 3), (200, 30, 30), np.uint8)
    result = embedder.embed([image], criteria=["color"])
print("universal", result.universal.shape, "color", result["color"].shape)
assert np.isfinite(result["color"]).all()
assert "torch" not in sys.modules
PYTHON
"$work/venv/bin/crl" info "$("$work/venv/bin/python" -c 'import crl_sdk; print(crl_sdk.demo_bundle())')"
}

try "$python" -c "$repository/constraints.txt"
if "$oldest" --version >/dev/null 2>&1; then
  try "$oldest" # its packages are older than those of constraints.txt
else
  echo "Python 3.10: skipped, $oldest is not there (name another with OLDEST_PYTHON)"
fi
