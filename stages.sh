#!/usr/bin/env bash
# What speedrun.sh, run1000.sh and runcpu.sh share: stages that run once.
#
#   read_option ARGUMENTS...  of an option NAME=VALUE or NAME VALUE, sets $option and $value
#   add_persona NAME FILE     notes --custom or --identity, from where the user is ($here)
#   begin TAG [FRESH]         names the run; where FRESH is not empty, every stage starts over
#   begin_persona [FRESH]     what follows is the persona's run, if any; with FRESH that starts over
#   stage NAME COMMAND...     runs the command unless it is done and what it builds on is the same
#   launch MODULE FLAGS...    `python -m MODULE FLAGS` in $processes processes on each machine
#   size REAL TINY            REAL; TINY where NANOCHAT_TINY is set, which rehearses in minutes
#
# A file $pace of lines `NAME STEPS SECONDS` makes trainers say how long all stages will take.
#
# A script that was killed is started again and goes on where it was. Only FRESH, or another corpus
# or tokenizer than a run began with, deletes checkpoints; any other flag is for the trainer to
# accept or refuse. With NNODES above 1 each machine runs the script with its own NODE_RANK and all
# share NANOCHAT_BASE_DIR; what is not a `launch` is done by machine 0, and the others wait for it.
#
# NANOCHAT_STOP_AFTER=3h50m, from the script's start, or SIGUSR1, by which Slurm warns, makes the
# stage under way save and end, and the script with status 75: to be started again.
set -euo pipefail
shopt -s extglob
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
nodes="${NNODES:-1}" node="${NODE_RANK:-0}" where=(--standalone)
if [ "$nodes" -gt 1 ]; then
  address="${MASTER_ADDR:?needed with NNODES above 1: the address of machine 0}"
  where=(--nnodes="$nodes" --node_rank="$node" --rdzv_backend=c10d
    --rdzv_endpoint="$address:${MASTER_PORT:-29400}")
fi
chain="on:" # and a checksum of how the corpus and the tokenizer were made, on which all else builds
ran=""      # not empty once a stage has run
asked=""    # not empty once SIGUSR1 asked to stop
pace=""     # the file, if there is one
persona=()  # flags of the stages that learn to talk
files=()    # of these flags
owner=""    # what is trained with them is called after the first file
export NANOCHAT_BEGAN="${NANOCHAT_BEGAN:-$(($(date +%s) - SECONDS))}"
# Where all processes are signalled, this one waits for the stage, which saves; alone, it ends with
# the stage.
trap asked=1 USR1
trap '[ -z "$asked" ] || exit 75' EXIT
trap 'exit 143' TERM

read_option() {
  option="${1%%=*}" value="${1#*=}"
  [ "$1" != "$option" ] || value="${2:-}"
  [ -n "$value" ] || { echo "error: $option needs a value" >&2 && exit 2; }
}

add_persona() {
  local file="$2" plain LC_ALL=C
  case $file in /*) ;; *) file="$here/$file" ;; esac
  persona+=("$1=$file")
  [ -e "$file" ] || file="${file%:*}" # without the epochs
  files+=("$file")
  [ -z "$owner" ] || return 0
  owner="$(basename "$file")" owner="${owner%.json*}" plain="${owner//[^A-Za-z0-9_.-]/-}"
  # Two names in Chinese would be the same dashes.
  case $owner in "" | *[!\ -~]*) plain+="-$(cksum <<<"$owner" | cut -d' ' -f1)" ;; esac
  owner=$plain
}

size() { if [ -n "${NANOCHAT_TINY:-}" ]; then echo "$2"; else echo "$1"; fi; }

begin() {
  tag=$1 notes="$NANOCHAT_BASE_DIR/done/$1"
  export NANOCHAT_STOPPED="$notes/stopped" # made by a stage whose time is up
  if [ "$node" = 0 ]; then
    if [ -n "${2:-}" ]; then
      touch "$NANOCHAT_BASE_DIR"/{base,mid,sft,rl}/"$tag"/.fresh 2>/dev/null || true # where one is
      rm -rf "$notes"
    fi
    mkdir -p "$notes"
    rm -f "$NANOCHAT_STOPPED"
    [ -n "$(ls -A "$notes")" ] || python -m nanochat.report reset
  fi
  meet begin
}

# The machines wait for each other, so that none reads what machine 0 is about to forget.
meet() {
  [ "$nodes" = 1 ] || torchrun "${where[@]}" --rdzv_id="$1" --nproc_per_node=1 --no-python true
}

# A persona shares the base model of the run. What is trained with it is made anew where a file or
# that model has changed.
begin_persona() {
  local stages=("$NANOCHAT_BASE_DIR"/{mid,sft,rl}) base="$NANOCHAT_BASE_DIR/base" whole=$tag made
  [ -n "$owner" ] || return 0
  meet persona # machine 0 has trained the base model
  made=$(echo "${persona[*]}" | cat - "$base/$whole/result.json" "${files[@]}" | cksum)
  chain="on:${made// /}"
  tag="$whole-$owner" notes="$NANOCHAT_BASE_DIR/done/$whole-$owner"
  if [ "$node" = 0 ]; then
    [ ! -e "$base/$tag" ] || [ -L "$base/$tag" ] ||
      { echo "error: $base/$tag is a model of its own; rename ${files[0]}" >&2 && exit 2; }
    mkdir -p "$notes" "${stages[@]/%//$tag}"
    ln -sfn "$whole" "$base/$tag"
    [ -z "${1:-}" ] || { touch "${stages[@]/%//$tag/.fresh}" && rm -f "$notes"/*; }
  fi
  meet persona_fresh
}

# A stage that begins notes its chain and command in NAME.began, one that is finished in NAME.
stage() {
  local name=$1 want run was="" start=$SECONDS status=0
  shift
  want="$chain $*"
  if is_done; then
    echo "== $name: done before"
  else
    ran=1
    case $name in base_train | mid_train | chat_sft | chat_rl)
      run=${name#chat_} run="$NANOCHAT_BASE_DIR/${run%_train}/$tag"
      read -r was _ 2>/dev/null <"$notes/$name.began" || true
      # The trainer deletes .fresh with all else there; killed before that, it is asked again.
      case $was in "$chain") ;; on:*) mkdir -p "$run" && touch "$run/.fresh" ;; esac
      [ ! -e "$run/.fresh" ] || set -- "$@" --fresh
      ;;
    esac
    echo "$want" >"$notes/$name.began"
    if [ -n "$pace" ]; then
      NANOCHAT_SECONDS_LATER="$(awk -v name="$name" \
        'later { sum += $3 } $1 == name { later = 1 } END { print sum + 0 }' "$pace")"
      export NANOCHAT_SECONDS_LATER
    fi
    echo "== $name: $*"
    if [ "$node" = 0 ] || [ "$1" = launch ]; then "$@" || status=$?; fi
    [ "$node" = 0 ] || [ "$status" = 0 ] || sleep 2 # until all know whether the time is up
    [ ! -e "$NANOCHAT_STOPPED" ] || leave
    [ "$status" = 0 ] || exit "$status" # 75, if asked
    if [ "$node" = 0 ]; then
      echo "$want" >"$notes/$name"
      echo "== $name: took $((SECONDS - start)) s"
    else
      until is_done; do
        [ ! -e "$NANOCHAT_STOPPED" ] || leave
        sleep 2
      done
    fi
    [ -z "$asked" ] || leave
  fi
  case $name in corpus | tok_train) chain="on:$(cksum <<<"$want" | tr -d ' ')" ;; esac
}

leave() { echo "== $name: the time is up; the same command goes on" && exit 75; }

is_done() {
  local file note free=' --device_batch_size=+([^ ])' # on which no result depends
  for file in "$notes/$name" "$notes/$name.began"; do # the latter differs where it ran again since
    IFS= read -r note 2>/dev/null <"$file" || return 1
    # Earlier versions noted a random number for the chain; once a stage has run, that is outdated.
    [[ $note = on:* || $ran ]] || note="$chain ${note#* }"
    [ "${note//$free/}" = "${want//$free/}" ] || return 1
  done
}

launch() {
  local module=$1
  shift
  # Not in the stage's command, so that another name for wandb does not start a stage over.
  case $module in *_train | *.chat_sft | *.chat_rl) set -- "$@" --run="${WANDB_RUN:-dummy}" ;; esac
  # What torchrun passes on; if it caught SIGHUP, it would end though nohup was to prevent that.
  local signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
  [ -n "$(trap -p HUP)" ] || signals+=,SIGHUP
  # Seconds from a signal to torchrun's kill: a step and a save may take more than its 30, but ranks
  # that wait for one that died are restarted only after them.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
  torchrun "${where[@]}" --rdzv_id="$module" --nproc_per_node="${processes:?}" \
    --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle="$signals" -m "$module" -- "$@"
}
