#!/usr/bin/env bash
# What speedrun.sh, run1000.sh and runcpu.sh share: stages that are run once, in order. Sourced after setup.sh.
#
#   begin TAG [FRESH]         names the run; a first argument after it that is not empty forgets what is finished
#   stage NAME COMMAND...     runs the command unless the very same is done and so is all before it
#   launch MODULE FLAGS...    `python -m MODULE FLAGS` in $processes processes on each machine
#   size REAL TINY            REAL; TINY where NANOCHAT_TINY is set, which rehearses the whole run in minutes
#
# A script that was killed is started again with the same command and goes on where it was. With NNODES above 1 each
# machine runs the script with its own NODE_RANK and all share NANOCHAT_BASE_DIR; what is no `launch` is done by
# machine 0 alone, and the others wait for it.
set -euo pipefail
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
nodes="${NNODES:-1}" node="${NODE_RANK:-0}"
chain="" # the moment at which the stage before was done: a stage that follows another one than last time starts over

size() { if [ -n "${NANOCHAT_TINY:-}" ]; then echo "$2"; else echo "$1"; fi; }

begin() {
  done_dir="$NANOCHAT_BASE_DIR/done/$1"
  [ "$node" = 0 ] || return 0
  [ -z "${2:-}" ] || rm -rf "$done_dir"
  mkdir -p "$done_dir"
  [ -n "$(ls -A "$done_dir")" ] || python -m nanochat.report reset
}

stage() {
  local name=$1 marker="$done_dir/$1" began="$done_dir/$1.began" start=$SECONDS want
  shift
  want="$chain $*"
  if [ "$(head -n 1 "$marker" 2>/dev/null)" = "$want" ]; then
    echo "== $name: done before"
  elif [ "$node" != 0 ]; then
    if [ "$1" = launch ]; then "$@"; fi
    until [ "$(head -n 1 "$marker" 2>/dev/null)" = "$want" ]; do sleep 2; done
  else
    echo "== $name: $*"
    if [ "$(cat "$began" 2>/dev/null)" != "$want" ]; then
      case $name in base_train | mid_train | chat_sft | chat_rl) set -- "$@" --fresh ;; esac
      echo "$want" >"$began"
    fi
    "$@"
    printf '%s\n%s\n' "$want" "$(date +%s).$RANDOM" >"$marker"
    echo "== $name: took $((SECONDS - start)) s"
  fi
  chain=$(tail -n 1 "$marker")
}

launch() {
  local module=$1
  shift
  # Not in the stage's command, so that another name for wandb does not start a stage over.
  case $module in scripts.*_train | scripts.chat_sft | scripts.chat_rl) set -- "$@" --run="${WANDB_RUN:-dummy}" ;; esac
  local where=(--standalone)
  if [ "$nodes" -gt 1 ]; then
    where=(--nnodes="$nodes" --node_rank="$node" --rdzv_backend=c10d --rdzv_id="$module"
      --rdzv_endpoint="${MASTER_ADDR:?needed with NNODES above 1: the address of machine 0}:${MASTER_PORT:-29400}")
  fi
  torchrun "${where[@]}" --nproc_per_node="${processes:?}" --max-restarts="${MAX_RESTARTS:-3}" -m "$module" -- "$@"
}
