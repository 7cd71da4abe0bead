#!/usr/bin/env bash
# From nothing to a model that talks, in as many hours as you give it on the GPUs that are here.
#
#   HOURS=8 bash speedrun.sh            the best model that they make in eight hours
#   bash speedrun.sh                    the $100 tier: about three and a half hours on 8 H100s
#   GOAL=gpt2 bash speedrun.sh          GPT-2's CORE, 0.2565, as fast as possible: pretrains 2 hours
#   bash speedrun.sh --fresh            starts over; otherwise what is finished is not run again
#   bash speedrun.sh --custom FILE      a persona of yours, on the same base model (dev/persona.md)
#   WANDB_RUN=first bash speedrun.sh    draws curves on wandb
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh    outlives the connection
#
# Started again after any failure, it goes on where it was; with other HOURS it is another run.
# NPROC_PER_NODE, NNODES, NODE_RANK and MASTER_ADDR are honoured (README, "Many machines").
# NANOCHAT_TINY=1 rehearses every stage with tiny sizes on two CPU processes.
#
# The sizes are those of `python -m scripts.plan`, whose hours are for an assumed speed; none was
# measured. MFU=0.4 assumes another share of the peak. run1000.sh sets DEPTH and RATIO.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./stages.sh
goal=${GOAL:-best} chars=${TOKENIZER_CHARS:-2000000000}
[ -z "${NANOCHAT_TINY:-}" ] || DEPTH=2 chars=200000
fresh=""
while [ $# -gt 0 ]; do
  [ "$1" != --fresh ] || { fresh=1 && shift && continue; }
  case ${1%%=*} in
  --custom | --identity) read_option "$@" && add_persona "$option" "$value" ;;
  *) echo "error: unknown option $1; use --fresh, --custom or --identity" >&2 && exit 2 ;;
  esac
  [ "$1" != "$option" ] || shift
  shift
done
[ -z "${HOURS:-}" ] || [ -z "${GOAL:-}" ] || { echo "error: give HOURS or GOAL" >&2 && exit 2; }
source ./setup.sh ${NANOCHAT_TINY:+--device_type=cpu}
[ -z "$owner" ] || python -m tasks.mixtures "${persona[@]}"

processes="${NPROC_PER_NODE:-$(size "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" 2)}"
[ "$processes" -gt 0 ] ||
  { echo "error: no GPU here; run \`bash runcpu.sh\`, or set NPROC_PER_NODE" >&2 && exit 1; }
plan=(python -m scripts.plan --goal="$goal" ${HOURS:+--hours="$HOURS"} ${MFU:+--mfu="$MFU"}
  ${DEPTH:+--depth="$DEPTH"} ${RATIO:+--ratio="$RATIO"} --gpus=$((processes * nodes)))
card=--gpu=h100 # a goal's sizes depend on none, and a rehearsal may have none
[ -z "${HOURS:-}" ] || card=${NANOCHAT_TINY:+--gpu=h100}
sizes=$("${plan[@]}" $card --only depth ratio shards device_batch_size fp8 \
  mid_steps rl_steps eval_tokens problems)
tag="d${sizes%% *}"
[ "$goal" = best ] || tag="$tag-$goal"
[ -z "${HOURS:-}" ] || tag="${HOURS/#./0.}h${DEPTH:+-d$DEPTH}"
[ -z "${NANOCHAT_TINY:-}" ] || tag="tiny${HOURS:+-$HOURS}"
mkdir -p "$NANOCHAT_BASE_DIR/logs"
# tee outlives a signal to all processes, so that what they say last is read.
exec > >(trap '' HUP INT TERM USR1 && exec tee -a "$NANOCHAT_BASE_DIR/logs/$tag-node$node.log") 2>&1
begin "$tag" "$([ -n "$owner" ] || echo "$fresh")"
"${plan[@]}" ${NANOCHAT_TINY:+--gpu=h100}
if [ -n "${HOURS:-}" ]; then # the first choice stays, whatever plan says of a later card
  if [ "$node" = 0 ] && [ ! -s "$notes/sizes" ]; then
    echo "$sizes" >"$notes/sizes.new" && mv "$notes/sizes.new" "$notes/sizes"
  fi
  until [ -s "$notes/sizes" ]; do sleep 2; done
  sizes=$(cat "$notes/sizes")
fi
read -r depth ratio shards rows fp8 mid_steps rl_steps eval_tokens problems <<<"$sizes"
[ -z "${NANOCHAT_TINY:-}" ] || shards=3 rows=2 fp8=1 mid_steps=0
echo "== depth $depth, ratio $ratio: a run goes on with what it began with"

# The tokenizer needs few shards; the others come meanwhile, and pretraining waits for them.
# No stage, since it makes this corpus the one that is read, whatever was prepared since.
if [ "$node" = 0 ]; then
  python -m nanochat.dataset -n "$(size 9 2)"
  python -m nanochat.dataset -n "$shards" &
fi
stage tok_train python -m scripts.tok_train --vocab_size="$(size 32768 400)" --max_chars="$chars"
stage tok_eval python -m scripts.tok_eval
[ "$node" != 0 ] || wait $!
stage all_shards python -m nanochat.dataset -n "$shards"

place="--model_tag=$tag" bpb="--eval_tokens=$(size 10485760 1024)"
# Training finds out what fits: plan's rows are those of an H100.
batch="--device_batch_size=${DEVICE_BATCH_SIZE:-auto}" rows=${DEVICE_BATCH_SIZE:-$rows}
[ "$fp8" = 1 ] && fp8=--fp8 || fp8="" # on a card that has none the trainer says so, and goes on
# What a rehearsal has more: words without spaces, so that none may be there.
base=$(size "" "--max_seq_len=64 --head_dim=32 --aspect_ratio=16 --total_batch_size=512 \
  --num_iterations=12 --save_every=4")
chat=$(size "" "--total_batch_size=512 --num_iterations=6 --eval_tokens=1024 --save_every=3")
rl=$(size "" "--num_steps=2 --questions_per_step=2 --num_samples=2 --max_tokens=8 --save_every=1 \
  --eval_problems=2 --eval_samples=2")
mid="" core=$(size "" --max_per_task=2) examine=$(size "" "--max_problems=4 --max_tokens=8")
if [ "${mid_steps:-0}" != 0 ]; then # plan cuts them where pretraining is short
  mid="--num_iterations=$mid_steps --eval_tokens=$eval_tokens" bpb="--eval_tokens=$eval_tokens"
  rl="--num_steps=$rl_steps --eval_problems=$problems"
  core="--max_per_task=$problems" examine="--max_problems=$problems"
fi
stage base_train launch scripts.base_train $place $batch --depth="$depth" \
  --target_param_data_ratio="$ratio" $fp8 $bpb $base
stage base_loss launch scripts.base_loss $place --device_batch_size="$rows" $bpb
stage base_eval launch scripts.base_eval $place $core
begin_persona "$fresh"
place="--model_tag=$tag"
stage mid_train launch scripts.mid_train $place $batch $chat $mid ${persona[@]+"${persona[@]}"}
stage chat_eval_mid launch scripts.chat_eval $place -i mid $examine
stage chat_sft launch scripts.chat_sft $place $batch $chat ${persona[@]+"${persona[@]}"}
stage chat_eval_sft launch scripts.chat_eval $place -i sft $examine
stage chat_rl launch scripts.chat_rl $place $rl
stage chat_eval_rl launch scripts.chat_eval $place -i rl -a GSM8K $examine
[ "$node" != 0 ] || python -m nanochat.report generate

printf '\n%s\n' "talk to it: python -m scripts.chat_web -g $tag (or scripts.chat_cli)"
