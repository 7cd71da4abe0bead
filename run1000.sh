#!/usr/bin/env bash
# The $1000 tier: speedrun.sh for about 38 hours on 8 H100s. What differs, and why:
#
#   depth 32: the first generation's $1000 model, so that the two can be compared
#   ratio 29: about what $900 pays for (28.9; `python -m scripts.plan --depth 32 --dollars 900`)
#   tokenizer on twice the text: the run is ten times as long, and this costs two minutes
set -euo pipefail
DEPTH=32 RATIO=29 TOKENIZER_CHARS=4000000000 exec bash "$(dirname "$0")/speedrun.sh" "$@"
