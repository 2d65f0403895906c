#!/usr/bin/env bash
# mini_an4: a handful of real recordings from CMU's AN4, enough to see every stage work, too few for a useful model.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train_set=train_nodev
valid_set=train_dev
test_sets="train_dev test"

../../TEMPLATE/asr1/asr.sh \
    --lang en \
    --fs 16k \
    --token_type bpe \
    --nbpe 30 \
    --asr_config conf/mini_an4_tiny.yaml \
    --inference_config conf/decode_default.yaml \
    --train_set "${train_set}" \
    --valid_set "${valid_set}" \
    --test_sets "${test_sets}" \
    "$@"
