#!/usr/bin/env bash
# Every static check, the Rust tests, and the size of the code base: bash dev/check.sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" --tests "$@"

run() {
  echo "check: $*"
  "$@"
}

run ruff format --check .
run ruff check .
run pyright
cd rustbpe
run cargo fmt --check
run cargo clippy --quiet --all-targets -- -D warnings
run cargo clippy --quiet --features python -- -D warnings
run cargo test --quiet
cd ..
echo "check: all clean"
python -m dev.size
