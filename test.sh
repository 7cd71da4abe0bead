#!/usr/bin/env bash
# Set-up, every check, every test: bash test.sh
#   --fast     leave out the tests marked slow
#   --long     with those that take minutes each, such as fifty kills, or every stage killed
# Anything else goes to pytest: bash test.sh -k tokenizer
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh --tests "$@"

arguments=() chosen="not long"
for argument in "$@"; do
  case "$argument" in
  --fast) chosen="not slow and not long" ;;
  --long) chosen="" ;;
  --device_type=* | --device-type=*) ;; # setup.sh has read it
  *) arguments+=("$argument") ;;
  esac
done
bash dev/check.sh "$@"
# One thread: those of tiny models wait for each other, sixteen times slower on a busy machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The odd expansion: bash 3.2, a Mac's, takes an empty array for an unset variable.
python -m pytest -n auto --maxprocesses=4 --dist worksteal --durations=5 -m "$chosen" \
  ${arguments[@]+"${arguments[@]}"}
