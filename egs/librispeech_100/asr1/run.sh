#!/usr/bin/env bash
# LibriSpeech, the 100-hour part: the model and budget of ESPnet's egs2/librispeech_100/asr_transducer1.
#   ./run.sh                                                          download, train on one GPU, decode, score
#   ./run.sh --local_data_opts "--librispeech /corpora/LibriSpeech"   the corpus is there already
#   ./run.sh --ngpu 8 --asr_config conf/librispeech_100/train_ebranchformer_mega_8gpu.yaml
#   ./run.sh --stage 10 --asr_config conf/librispeech_100/train_conformer_rnn.yaml      another model, the same data
#   ./run.sh --stage 10 --asr_config conf/librispeech_100/train_ebranchformer_mega_streaming.yaml \
#            --inference_config conf/librispeech_100/decode_streaming.yaml              streaming
# Disk: 15 GB for the corpus, some 35 GB for the formatted audio with its copies at two other speeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train_set=train_clean_100
valid_set=dev
test_sets="test_clean test_other dev_clean dev_other"

../../TEMPLATE/asr1/asr.sh \
    --lang en \
    --ngpu 1 \
    --fs 16k \
    --max_wav_duration 30 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --token_type bpe \
    --nbpe 500 \
    --asr_config conf/librispeech_100/train_ebranchformer_mega.yaml \
    --inference_config conf/decode_default.yaml \
    --train_set "${train_set}" \
    --valid_set "${valid_set}" \
    --test_sets "${test_sets}" \
    "$@"
