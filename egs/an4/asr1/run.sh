#!/usr/bin/env bash
# AN4, all of it: spelled names, addresses and numbers, 948 recordings to train on and 130 to test.
#   ./run.sh --ngpu 1                                            download, train, decode, score
#   ./run.sh --local_data_opts "--an4 PATH"                      the archive or the corpus is there already
#   ./run.sh --stage 10 --asr_config conf/an4/train_rnn.yaml     ESPnet's LSTM on the same encoder and budget
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train_set=train_nodev
valid_set=train_dev
test_sets="train_dev test"

../../TEMPLATE/asr1/asr.sh \
    --lang en \
    --fs 16k \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --token_type bpe \
    --nbpe 30 \
    --asr_config conf/an4/train_mega.yaml \
    --inference_config conf/decode_default.yaml \
    --train_set "${train_set}" \
    --valid_set "${valid_set}" \
    --test_sets "${test_sets}" \
    "$@"
