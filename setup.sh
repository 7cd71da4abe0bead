#!/usr/bin/env bash
# Everything that nanochat needs, in .venv beside this file. Every other shell script sources it:
#
#   source setup.sh [--tests] [--device_type=cpu|cuda]
#
# It finds or installs uv and cargo, creates .venv on an installed Python 3.11 to 3.13, installs
# requirements.lock with its hashes checked, and builds the Rust tokenizer trainer. --tests adds
# requirements-test.lock. The caller is left in this folder with .venv active. On Linux without an
# NVIDIA GPU torch's CPU build is taken, from PyTorch's own index (its hash is in no lock), unless
# that cannot be reached or --device_type=cuda says that a GPU will come.
#
# Sourced, it starts itself as a child process, which has its own `set -euo pipefail`, whatever the
# caller's options, and a lock that ends with it.

nanochat_root=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
# Appended, so that the user's tools come first. The last one: nvidia-smi under WSL.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:$nanochat_root/.uv/bin:/usr/lib/wsl/lib"
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

device_is() { case "$flags" in *" __device_type"[=\ ]"$1 "*) ;; *) return 1 ;; esac }

# Not /proc/driver/nvidia: a container sees it on a machine whose GPU it was not given.
has_gpu() { command -v nvidia-smi >/dev/null || ls /dev/nvidia* >/dev/null 2>&1; }

# A CUDA build that is there stays. Whether there is a GPU decides, not --device_type=cpu, which
# runcpu.sh gives on every machine.
install_lock() {
  local cpu=("${install[@]}" --no-deps --torch-backend=cpu "$torch") answer
  if [ "$(uname)" = Linux ] && ! has_gpu && ! device_is cuda &&
    ! ls -d .venv/lib/*/*/triton >/dev/null 2>&1; then
    # Asked for first: an index that is out of reach shall cost 20 seconds, not its retries.
    if answer=$(UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=1 "${cpu[@]}" --dry-run 2>&1); then
      say "no NVIDIA GPU here: downloading about 0.4 GB, with the CPU build of torch"
      "${cpu[@]}"
      awk '/^[a-z]/ { cuda = /^(torch==|triton==|nvidia-|cuda-)/ } !cuda' requirements.lock |
        "${install[@]}" --require-hashes -r -
      return
    fi
    say "no CPU build of torch to be had (${answer##*: }): taking the one with CUDA"
  fi
  [ "$(uname)" != Linux ] || say "downloading about 3 GB, most of it CUDA"
  "${install[@]}" --require-hashes -r requirements.lock
}

check_gpu() {
  if device_is cpu || ! has_gpu; then return; fi
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return
  fail "torch sees no GPU though there is an NVIDIA one; run" \
    "\`cd $PWD && $(command -v uv) pip install --torch-backend=auto --reinstall-package torch" \
    "$torch\` for a build that fits the driver," \
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
flags=" ${*//-/_} " torch=$(grep -om1 '^torch==[^ ]*' requirements.lock)
install=(uv pip install --python .venv/bin/python)
once requirements "$(cksum requirements.lock)" install_lock
case " $* " in *" --tests "*)
  once requirements-test "$(cksum requirements-test.lock)" \
    "${install[@]}" --require-hashes -r requirements-test.lock
  ;;
esac
rust=$(cksum pyproject.toml rustbpe/Cargo.toml $(find rustbpe/src -type f | sort))
once rustbpe "$rust" env PATH="$PWD/.venv/bin:$PATH" \
  "${install[@]}" --no-deps --no-build-isolation -e .
check_gpu
say "ready: .venv with $(.venv/bin/python --version)"
