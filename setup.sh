#!/usr/bin/env bash
# Everything that nanochat needs, in .venv beside this file. Every other shell script sources it:
#
#   source setup.sh [--tests] [--device_type=cpu]
#
# It finds or installs uv and cargo, creates .venv on an installed Python 3.11 to 3.13, installs
# requirements.lock with its hashes checked, and builds the Rust tokenizer trainer. --tests adds
# requirements-test.lock. The caller is left in this folder with .venv active.
#
# Sourced, it starts itself as a child process, which has its own `set -euo pipefail`, whatever the
# caller's options, and a lock that ends with it.

nanochat_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
# Appended, so that the user's tools come first.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:$nanochat_root/.uv/bin"
cd "$nanochat_root" || return 1

if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then
  bash "$nanochat_root/setup.sh" "$@" || return 1
  . "$nanochat_root/.venv/bin/activate"
  unset nanochat_root
  return 0
fi

set -euo pipefail
UV_VERSION=0.13.9 # installed if there is no uv

say() { echo "setup: $*"; }
fail() { echo "error: $*" >&2 && exit 1; }

find_tools() {
  if ! command -v uv >/dev/null; then
    say "installing uv into .uv"
    # A virtual environment of its own: pip refuses to install into many systems' Python (PEP 668).
    { python3 -m venv .uv && .uv/bin/python -m pip install --quiet "uv==$UV_VERSION"; } ||
      curl -LsSf "https://astral.sh/uv/$UV_VERSION/install.sh" |
      UV_INSTALL_DIR="$PWD/.uv/bin" UV_NO_MODIFY_PATH=1 sh ||
      fail "uv cannot be installed here; install it by hand, see docs.astral.sh/uv"
  fi
  if ! command -v cargo >/dev/null; then
    say "installing Rust with rustup"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
      sh -s -- -y --no-modify-path --profile minimal --component clippy,rustfmt ||
      fail "Rust cannot be installed here; install it by hand, see rustup.rs"
  fi
  command -v cc >/dev/null || fail "Rust needs a C linker; run" \
    "\`apt-get install build-essential\`, or \`xcode-select --install\` on a Mac"
}

# once NAME INPUTS COMMAND...: runs the command unless it was run with these very inputs. Left to
# itself, uv builds `-e .` every time, and puts the CUDA libraries of the lock back over those of a
# torch that was chosen for the driver.
once() {
  if [ "$2" = "$(cat ".venv/$1.stamp" 2>/dev/null)" ]; then return; fi
  say "installing $1"
  "${@:3}"
  echo "$2" >".venv/$1.stamp"
}

check_gpu() {
  case " ${*//-/_} " in *" __device_type"[=\ ]"cpu "*) return ;; esac
  command -v nvidia-smi >/dev/null || return 0
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return
  fail "torch sees no GPU though nvidia-smi is here; run" \
    "\`cd $PWD && $(command -v uv) pip install --torch-backend=auto --reinstall-package torch" \
    "$(grep -om1 '^torch==[^ ]*' requirements.lock)\` for a build that fits the driver," \
    "or give --device_type=cpu"
}

if command -v flock >/dev/null; then
  exec 9<setup.sh
  flock --nonblock 9 || { say "waiting for another set-up in this folder" && flock 9; }
fi
find_tools
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'
if ! .venv/bin/python -c "$in_range" 2>/dev/null; then
  say "creating .venv"
  # `system`: an installed Python first; one is downloaded only where none fits.
  uv venv --quiet --clear --relocatable --python-preference system --python '>=3.11,<3.14' .venv
fi
install=(uv pip install --python .venv/bin/python)
locks=(requirements)
case " $* " in *" --tests "*) locks+=(requirements-test) ;; esac
for lock in "${locks[@]}"; do
  once "$lock" "$(cksum "$lock.lock")" "${install[@]}" --require-hashes -r "$lock.lock"
done
rust=$(cksum pyproject.toml rustbpe/Cargo.toml $(find rustbpe/src -type f | sort))
once rustbpe "$rust" env PATH="$PWD/.venv/bin:$PATH" \
  "${install[@]}" --no-deps --no-build-isolation -e .
check_gpu "$@"
say "ready: .venv with $(.venv/bin/python --version)"
