#!/usr/bin/env bash
# What speedrun.sh, run1000.sh and runcpu.sh share: stages that run once, in order. Sourced after setup.sh.
#
#   begin TAG [FRESH]         names the run; where FRESH is not empty, every stage starts over
#   stage NAME COMMAND...     runs the command unless it is done and what it builds on is the same as then
#   launch MODULE FLAGS...    `python -m MODULE FLAGS` in $processes processes on each machine
#   size REAL TINY            REAL; TINY where NANOCHAT_TINY is set, which rehearses the whole run in minutes
#
# A script that was killed is started again and goes on where it was. Only FRESH, or another corpus or tokenizer
# than a run began with, deletes checkpoints; any other change of flags is for the trainer to accept or refuse.
# With NNODES above 1 each machine runs the script with its own NODE_RANK and all share NANOCHAT_BASE_DIR; what
# is not a `launch` is done by machine 0 alone, and the others wait for it.
set -euo pipefail
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
nodes="${NNODES:-1}" node="${NODE_RANK:-0}" where=(--standalone)
if [ "$nodes" -gt 1 ]; then
  where=(--nnodes="$nodes" --node_rank="$node" --rdzv_backend=c10d
    --rdzv_endpoint="${MASTER_ADDR:?needed with NNODES above 1: the address of machine 0}:${MASTER_PORT:-29400}")
fi
chain="" # what the next stage builds on: a checksum of the commands that made the corpus and the tokenizer

size() { if [ -n "${NANOCHAT_TINY:-}" ]; then echo "$2"; else echo "$1"; fi; }

begin() {
  local run
  tag=$1 done_dir="$NANOCHAT_BASE_DIR/done/$1"
  if [ "$node" = 0 ]; then
    if [ -n "${2:-}" ]; then
      for run in "$NANOCHAT_BASE_DIR"/{base,mid,sft,rl}/"$tag"; do [ ! -d "$run" ] || touch "$run/.fresh"; done
      rm -rf "$done_dir"
    fi
    mkdir -p "$done_dir"
    [ -n "$(ls -A "$done_dir")" ] || python -m nanochat.report reset
  fi
  # The machines wait for each other, so that none reads what machine 0 is about to forget.
  [ "$nodes" = 1 ] || torchrun "${where[@]}" --rdzv_id=begin --nproc_per_node=1 --no-python true
}

# A finished stage leaves $done_dir/NAME: the chain it built on and its command, then the chain for the next stage.
# A trainer leaves NAME.began as well, with the chain on which its run began.
stage() {
  local name=$1 marker="$done_dir/$1" began="$done_dir/$1.began" start=$SECONDS want run began_on next
  shift
  want="$chain $*"
  if is_done; then
    echo "== $name: done before"
  else
    case $name in base_train | mid_train | chat_sft | chat_rl)
      run=${name#chat_} run="$NANOCHAT_BASE_DIR/${run%_train}/$tag" began_on=$(chain_of "$began")
      if [ "${began_on:-$chain}" != "$chain" ] || [ -e "$run/.fresh" ]; then
        # The trainer deletes .fresh with all else in the folder; killed before that, it is asked again.
        mkdir -p "$run" && touch "$run/.fresh"
        set -- "$@" --fresh
      fi
      [ "$began_on" = "$chain" ] || echo "$want" >"$began"
      ;;
    esac
    echo "== $name: $*"
    if [ "$node" = 0 ]; then
      "$@"
      next=$chain
      if [ -e "$marker" ] && [ "$(chain_of "$marker")" = "$chain" ]; then next=$(tail -n 1 "$marker"); fi
      case $name in corpus | tok_train) next=$(cksum <<<"$want" | tr ' ' .) ;; esac
      printf '%s\n%s\n' "$want" "$next" >"$marker"
      echo "== $name: took $((SECONDS - start)) s"
    else
      if [ "$1" = launch ]; then "$@"; fi
      until is_done; do sleep 2; done
    fi
  fi
  chain=$(tail -n 1 "$marker")
}

is_done() {
  local free='s/ --device_batch_size=[^ ]*//g' # no result depends on it
  [ -e "$marker" ] && [ "$(head -n 1 "$marker" | sed "$free")" = "$(sed "$free" <<<"$want")" ]
}

chain_of() { sed -n '1s/ .*//p' "$1" 2>/dev/null || true; }

launch() {
  local module=$1
  shift
  # Not in the stage's command, so that another name for wandb does not start a stage over.
  case $module in scripts.*_train | scripts.chat_sft | scripts.chat_rl) set -- "$@" --run="${WANDB_RUN:-dummy}" ;; esac
  torchrun "${where[@]}" --rdzv_id="$module" --nproc_per_node="${processes:?}" --max-restarts="${MAX_RESTARTS:-3}" \
    -m "$module" -- "$@"
}
