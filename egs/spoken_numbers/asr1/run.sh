#!/usr/bin/env bash
# Spoken numbers: digit strings, dates, amounts and commands, spoken by espeak-ng. No download, no GPU, minutes.
#   ./run.sh                                  from data to scores
#   ./run.sh --stage 11 --asr_config conf/train_rnn.yaml     ESPnet's LSTM on the same encoder and budget
# One thread trains so small a model faster than two.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train_set=train
valid_set=dev
test_sets="test test_unseen"

../../TEMPLATE/asr1/asr.sh \
    --lang en \
    --fs 16k \
    --token_type bpe \
    --nbpe 145 \
    --train_threads 1 \
    --asr_config conf/train_mega.yaml \
    --inference_config "conf/decode_default.yaml conf/decode_tsd.yaml conf/decode_alsd.yaml conf/decode_maes.yaml" \
    --train_set "${train_set}" \
    --valid_set "${valid_set}" \
    --test_sets "${test_sets}" \
    "$@"
