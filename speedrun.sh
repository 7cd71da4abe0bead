#!/usr/bin/env bash
# The $100 tier: from nothing to a model that talks, on one machine with 8 H100s, in about three and a half hours.
#
#   bash speedrun.sh                                          # here and now
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh    # in a session that outlives the connection
#   WANDB_RUN=first bash speedrun.sh                          # with curves on wandb
#   bash speedrun.sh --fresh                                  # start over: delete the run of this depth
#
# Started again after any failure, it goes on where it was. NPROC_PER_NODE, NNODES, NODE_RANK and MASTER_ADDR are
# honoured (README, "Many machines"). NANOCHAT_TINY=1 rehearses every stage with tiny sizes on two CPU processes.
#
# Depth and ratio: of what $100 pays for at $24 an hour, the depth whose ratio is nearest to the best one, with a
# reserve of a fifth (`python -m scripts.plan --dollars 85`). run1000.sh sets them, and what follows from them, anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
depth=${DEPTH:-24} ratio=${RATIO:-12} tokenizer_chars=${TOKENIZER_CHARS:-2000000000}
tag="d$depth"
[ -z "${NANOCHAT_TINY:-}" ] || depth=2 tag=tiny
case $* in
"" | --fresh) ;;
*) echo "error: unknown option $*; the only one is --fresh, which starts over" >&2 && exit 2 ;;
esac
source ./setup.sh ${NANOCHAT_TINY:+--device_type=cpu}
source ./stages.sh

processes="${NPROC_PER_NODE:-$(size "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" 2)}"
[ "$processes" -gt 0 ] || { echo "error: no GPU here; run \`bash runcpu.sh\`, or set NPROC_PER_NODE" >&2 && exit 1; }
mkdir -p "$NANOCHAT_BASE_DIR/logs"
exec > >(tee -a "$NANOCHAT_BASE_DIR/logs/$tag-node$node.log") 2>&1
begin "$tag" "$*"
plan=(python -m scripts.plan --depth="$depth" --ratio="$ratio" --gpus=$((processes * nodes)))
shards=$(size "$("${plan[@]}" --only=shards)" 3)
rows=${DEVICE_BATCH_SIZE:-$(size "$("${plan[@]}" --only=device_batch_size)" 2)}
"${plan[@]}"

# The tokenizer needs a few shards only; the rest come while it is trained and are waited for before pretraining.
stage first_shards python -m nanochat.dataset -n "$(size 9 2)"
download=""
if [ "$node" = 0 ]; then python -m nanochat.dataset -n "$shards" & download=$!; fi
stage tok_train python -m scripts.tok_train --vocab_size="$(size 32768 400)" --max_chars="$(size "$tokenizer_chars" 200000)"
stage tok_eval python -m scripts.tok_eval
[ -z "$download" ] || wait "$download"
stage all_shards python -m nanochat.dataset -n "$shards"

place=(--model_tag="$tag")
batch=(--device_batch_size="$rows")
tiny=() chat=() chat_examine=() base_examine=() reinforce=()
if [ -n "${NANOCHAT_TINY:-}" ]; then # numbers, and nothing else
  tiny=(--max_seq_len=64 --head_dim=32 --aspect_ratio=16 --total_batch_size=512 --num_iterations=12 --save_every=4)
  chat=(--total_batch_size=512 --num_iterations=6 --eval_tokens=1024 --save_every=3)
  base_examine=(--max_per_task=2) chat_examine=(--max_problems=4 --max_tokens=8)
  reinforce=(--num_steps=2 --questions_per_step=2 --num_samples=2 --max_tokens=8 --eval_problems=2 --eval_samples=2 --save_every=1)
fi
stage base_train launch scripts.base_train "${place[@]}" "${batch[@]}" --depth="$depth" \
  --target_param_data_ratio="$ratio" --eval_tokens="$(size 10485760 1024)" ${tiny[@]+"${tiny[@]}"}
stage base_loss launch scripts.base_loss "${place[@]}" "${batch[@]}" --eval_tokens="$(size 10485760 1024)"
stage base_eval launch scripts.base_eval "${place[@]}" ${base_examine[@]+"${base_examine[@]}"}
stage mid_train launch scripts.mid_train "${place[@]}" "${batch[@]}" ${chat[@]+"${chat[@]}"}
stage chat_eval_mid launch scripts.chat_eval "${place[@]}" -i mid ${chat_examine[@]+"${chat_examine[@]}"}
stage chat_sft launch scripts.chat_sft "${place[@]}" "${batch[@]}" ${chat[@]+"${chat[@]}"}
stage chat_eval_sft launch scripts.chat_eval "${place[@]}" -i sft ${chat_examine[@]+"${chat_examine[@]}"}
stage chat_rl launch scripts.chat_rl "${place[@]}" ${reinforce[@]+"${reinforce[@]}"}
stage chat_eval_rl launch scripts.chat_eval "${place[@]}" -i rl -a GSM8K ${chat_examine[@]+"${chat_examine[@]}"}
[ "$node" != 0 ] || python -m nanochat.report generate

echo
echo "talk to it: python -m scripts.chat_web -g $tag, or python -m scripts.chat_cli -g $tag"
