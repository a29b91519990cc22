#!/usr/bin/env bash
# Generates crl_sdk/pb from proto/. With --check it only compares the committed stubs with the
# generated ones.
#
# The stubs depend on the version of grpcio-tools in constraints.txt. An older version keeps them
# loadable by older protobuf runtimes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
target=$(mktemp -d)
trap 'rm -rf "$target"' EXIT
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -Icrl_sdk/pb=proto \
  --python_out="$target" --mypy_out="quiet:$target" \
  --grpc_python_out="$target" --mypy_grpc_out="quiet:$target" $(cd proto && find . -name '*.proto' | sed 's#^\./#crl_sdk/pb/#' | sort)
find "$target/crl_sdk/pb" -type d -exec sh -c 'for d; do printf "%s\n" "\"\"\"Generated from proto/ by proto/generate.sh; do not edit.\"\"\"" >"$d/__init__.py"; done' _ {} +
if [ "${1:-}" = --check ]; then
  diff -r -x __pycache__ "$target/crl_sdk/pb" crl_sdk/pb ||
    { echo "crl_sdk/pb differs from the stubs that proto/ generates: run make stubs" >&2; exit 1; }
else
  rm -rf crl_sdk/pb
  mv "$target/crl_sdk/pb" crl_sdk/pb
fi
