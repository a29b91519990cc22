#!/usr/bin/env bash
# Checks the contract in proto/crl: buf's lint, changes that break the wire format since
# proto/baseline.binpb, and whether crl_sdk/pb is what the contract generates.
#
# With --accept it also writes the present contract as the new baseline. Do this at a release: what
# the baseline holds may then no longer be changed or removed.
#
# buf comes from npm, in the version that proto/package.json pins, into build/buf. Set BUF to use
# another copy.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${BUF:-}" ]; then
  BUF=$PWD/build/buf/node_modules/.bin/buf
  if ! cmp -s proto/package.json build/buf/package.json || [ ! -x "$BUF" ]; then
    command -v npm >/dev/null || {
      echo "proto/check.sh needs npm, which brings buf: install Node.js 18 or later" \
        "(https://nodejs.org, or 'apt install npm'), or set BUF to the path of a buf binary" >&2
      exit 1
    }
    mkdir -p build/buf
    npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts \
      --prefix build/buf "$(sed -n 's/.*"\(@bufbuild\/buf\)": "\(.*\)".*/\1@\2/p' proto/package.json)"
    cp proto/package.json build/buf/package.json # last, so that a failed install is tried again
  fi
fi

"$BUF" lint proto
"$BUF" breaking proto --against proto/baseline.binpb ||
  { echo "proto: these changes break clients of the last release; add new fields instead" >&2; exit 1; }
proto/generate.sh --check
if [ "${1:-}" = --accept ]; then
  "$BUF" build proto --exclude-source-info --output proto/baseline.binpb
fi
