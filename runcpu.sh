#!/usr/bin/env bash
# The whole of nanochat on a laptop, offline, in minutes: tokenizer, pretraining, midtraining,
# finetuning, reinforcement, report, and a conversation with the result.
#
#   bash runcpu.sh                  learn the primer, the small world that comes with nanochat
#   bash runcpu.sh --minutes M      only as many steps as this machine makes in M minutes, or more
#   bash runcpu.sh --from FOLDER    pretrain on your own text (.txt, .md, .jsonl, parquet) instead;
#                                   --name and --text_field as in python -m nanochat.dataset
#   bash runcpu.sh --fresh          start over; otherwise what is finished is not run again
#   bash runcpu.sh --custom FILE    a persona of yours, on the same base model (dev/persona.md);
#                                   also several files, FILE:EPOCHS, and --identity FILE
#
# Killed at any point and started again, it goes on where it was, with the steps that it chose
# first. The sizes below are what learned most per minute on two cores; dev/LOG.md has the trials.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"

source ./stages.sh
fresh="" from="" minutes="" source=(--corpus primer)
while [ $# -gt 0 ]; do
  case ${1%%=*} in
  --fresh) fresh=1 && shift && continue ;;
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' runcpu.sh && exit ;;
  --minutes | --from | --name | --text[-_]field | --custom | --identity) read_option "$@" ;;
  *) echo "error: unknown option $1; use one of --help" >&2 && exit 2 ;;
  esac
  case $option in
  --minutes) minutes="$value" ;;
  --from) case $value in /*) from="$value" ;; *) from="$here/$value" ;; esac ;;
  --name | --text[-_]field) source+=("$option=$value") ;;
  *) add_persona "$option" "$value" ;;
  esac
  [ "$1" != "$option" ] || shift
  shift
done
if [ -n "$from" ]; then
  [ -e "$from" ] || { echo "error: --from $from is no folder" >&2 && exit 2; }
  [ ! -d "$from" ] || from="$(cd "$from" && pwd)"
  source=(--from "$from" "${source[@]:2}")
fi
source ./setup.sh --device_type=cpu
corpus=primer
[ "${#source[@]}$from" = 2 ] || corpus="$(python -m nanochat.dataset "${source[@]}" --print_name)"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" # huge pages: 4 % off a step
tag="laptop-$corpus"
place=(--device_type=cpu --model_tag="$tag")
[ -z "$owner" ] || python -m tasks.mixtures "${persona[@]}"
begin "$tag" "$([ -n "$owner" ] || echo "$fresh")"

# The steps of each stage, measured once: the same when a run goes on.
chosen="$notes/pace-${minutes:-own}" pace="$notes/pace"
if [ ! -s "$pace" ]; then
  echo "== how fast this machine is"
  if [ -n "$minutes" ]; then plan=(--minutes="$minutes"); else plan=(--laptop); fi
  python -m scripts.plan "${plan[@]}" >"$pace.new"
  mv "$pace.new" "$chosen" && ln -sf "$(basename "$chosen")" "$pace"
  awk '{ all += $3 } END { printf "about %.0f minutes in all\n", all / 60 }' "$pace"
elif [ -n "$minutes" ] && [ ! -s "$chosen" ]; then
  echo "error: $tag began with other --minutes; go on without, or start over with" \
    "\`bash runcpu.sh --fresh --minutes=$minutes\`" >&2
  exit 2
fi
steps() { awk -v stage="$1" '$1 == stage { print $2 }' "$pace"; }

stage corpus python -m nanochat.dataset "${source[@]}"
stage tok_train python -m scripts.tok_train --data="$corpus" --vocab_size=2048 --max_chars=20000000
stage tok_eval python -m scripts.tok_eval --data="$corpus"
stage base_train python -m scripts.base_train "${place[@]}" --data="$corpus" \
  --depth=6 --aspect_ratio=26 --head_dim=80 --max_seq_len=512 --mask_documents \
  --total_batch_size=2048 --device_batch_size=4 --num_iterations="$(steps base_train)" \
  --eval_every=1000 --eval_tokens=32768 --save_every=200 --log_every=100
stage base_loss python -m scripts.base_loss "${place[@]}" --data="$corpus" --eval_tokens=65536 \
  --device_batch_size=8
stage base_eval python -m scripts.base_eval "${place[@]}" -a primer-choice
begin_persona "$fresh"
place=(--device_type=cpu --model_tag="$tag")
chat=(--mixture=primer ${persona[@]+"${persona[@]}"} --mask_documents --total_batch_size=2048
  --device_batch_size=4 --eval_every=1000 --eval_tokens=32768 --save_every=200 --log_every=100)
examine=(-a 'primer-choice|primer-exact|primer-arithmetic|primer-spelling|primer-visitor'
  --max_tokens=128)
stage mid_train python -m scripts.mid_train "${place[@]}" "${chat[@]}" \
  --num_iterations="$(steps mid_train)"
stage chat_eval_mid python -m scripts.chat_eval "${place[@]}" -i mid "${examine[@]}"
stage chat_sft python -m scripts.chat_sft "${place[@]}" "${chat[@]}" \
  --num_iterations="$(steps chat_sft)" --lr_scale=0.3 --moments
stage chat_eval_sft python -m scripts.chat_eval "${place[@]}" -i sft "${examine[@]}"
stage chat_rl python -m scripts.chat_rl "${place[@]}" --task=primer-quizzes --lr_scale=0.1 \
  --num_steps="$(steps chat_rl)" --questions_per_step=32 --num_samples=8 --max_tokens=32 \
  --eval_samples=1 --save_every=10 --log_every=5
stage chat_eval_rl python -m scripts.chat_eval "${place[@]}" -i rl "${examine[@]}"
python -m nanochat.report generate

printf '\n%s\n' "== a conversation with it; for your own: python -m scripts.chat_cli -i rl -g $tag"
printf '%s\n' "Hello!" "Who are you?" "Who made you?" "What is 27 plus 58?" \
  "What colour is snow?" "How do you spell tiger?" "Tell me a story about a fox." |
  python -m scripts.chat_cli "${place[@]}" -i rl --temperature=0
