#!/usr/bin/env bash
# Everything that nanochat needs, in .venv beside this file. Every other shell script sources it:
#
#   source setup.sh [--tests] [--device_type=cpu]
#
# It finds or installs uv and cargo, creates .venv on an installed Python 3.11 to 3.13, installs requirements.lock
# with its hashes checked, and builds the Rust tokenizer trainer. --tests adds requirements-test.lock. The caller is
# left in this folder with .venv active. A step whose input files have not changed is not done again.
#
# The choice that would surprise: sourced, it starts itself as a child process. There it works under its own
# `set -euo pipefail`, whatever the caller's options, and under a lock that ends with it.

nanochat_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
# Appended, so that what the user already has comes first.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:$nanochat_root/.uv/bin"
cd "$nanochat_root" || return 1

if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then
  bash "$nanochat_root/setup.sh" "$@" || return 1
  . "$nanochat_root/.venv/bin/activate"
  unset nanochat_root
  return 0
fi

set -euo pipefail
UV_VERSION=0.13.9 # installed only where there is no uv

say() { echo "setup: $*"; }
fail() {
  echo "error: $*" >&2
  exit 1
}

find_uv() {
  command -v uv >/dev/null && return
  say "installing uv into .uv"
  # A virtual environment of its own: pip refuses to install into many systems' Python (PEP 668).
  if python3 -m venv .uv && .uv/bin/python -m pip install --quiet "uv==$UV_VERSION"; then return; fi
  say "no luck with pip; trying uv's own installer"
  curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" |
    UV_INSTALL_DIR="$PWD/.uv/bin" UV_NO_MODIFY_PATH=1 sh ||
    fail "uv cannot be installed here; install it by hand, see docs.astral.sh/uv"
}

find_cargo() {
  if ! command -v cargo >/dev/null; then
    say "installing Rust with rustup"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
      sh -s -- -y --no-modify-path --profile minimal --component clippy,rustfmt ||
      fail "Rust cannot be installed here; install it by hand, see rustup.rs"
  fi
  command -v cc >/dev/null ||
    fail "Rust needs a C linker; run \`apt-get install build-essential\`, or \`xcode-select --install\` on a Mac"
}

make_venv() {
  local in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
  if .venv/bin/python -c "$in_range" 2>/dev/null; then return; fi
  say "creating .venv"
  # `system`: an installed Python first; one is downloaded only where none fits.
  uv venv --quiet --clear --relocatable --python-preference system --python '>=3.11,<3.14' .venv
}

# once STEP "what is said" FILE... -- COMMAND...: run the command unless STEP was done with these very files.
once() {
  local stamp=".venv/$1.stamp" text=$2 inputs
  shift 2
  local files=()
  while [ "$1" != -- ]; do
    files+=("$1")
    shift
  done
  shift
  inputs=$(cksum "${files[@]}")
  if [ "$inputs" = "$(cat "$stamp" 2>/dev/null)" ]; then return; fi
  say "$text"
  "$@"
  echo "$inputs" >"$stamp"
}

check_gpu() {
  case " $* " in *" --device_type=cpu "* | *" --device-type=cpu "* | *" --device_type cpu "* | *" --device-type cpu "*) return ;; esac
  command -v nvidia-smi >/dev/null || return 0
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return
  local torch
  torch=$(grep -om1 '^torch==[^ ]*' requirements.lock)
  fail "torch sees no GPU though nvidia-smi is here; run \`cd $PWD && $(command -v uv) pip install" \
    "--torch-backend=auto --reinstall-package torch $torch\` for a build that fits the driver, or give --device_type=cpu"
}

if command -v flock >/dev/null; then
  exec 9<setup.sh
  flock --nonblock 9 || { say "waiting for another set-up in this folder" && flock 9; }
fi
find_uv
find_cargo
make_venv
install=(uv pip install --python .venv/bin/python)
once requirements "installing requirements.lock" requirements.lock -- \
  "${install[@]}" --require-hashes -r requirements.lock
case " $* " in *" --tests "*)
  once requirements-test "installing requirements-test.lock" requirements-test.lock -- \
    "${install[@]}" --require-hashes -r requirements-test.lock
  ;;
esac
# shellcheck disable=SC2046 # our own file names have no spaces
once rustbpe "building the Rust tokenizer trainer" pyproject.toml rustbpe/Cargo.toml $(find rustbpe/src -type f | sort) -- \
  env PATH="$PWD/.venv/bin:$PATH" "${install[@]}" --no-deps --no-build-isolation -e .
check_gpu "$@"
say "ready: .venv with $(.venv/bin/python --version)"
