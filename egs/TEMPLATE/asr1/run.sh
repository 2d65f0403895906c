#!/usr/bin/env bash
# One's own data: give data/{train,valid,test}/{wav.scp,text} and go.
#
#   mkdir -p egs/mine/asr1                                                         in the repository
#   cp -R egs/TEMPLATE/asr1/{run.sh,path.sh,local,conf} egs/mine/asr1/
#   data/train/wav.scp     utterance  path of the recording (WAV, FLAC, OGG, MP3, SPHERE; from this folder, or
#                          absolute), or a command whose output it is, ending in |
#   data/train/text        utterance  what is said in it
#   the same for data/valid (some minutes) and data/test
#   egs/mine/asr1/run.sh --ngpu 1
#
# One line an utterance, in any order. Optional: data/<set>/utt2spk (utterance speaker) and data/<set>/segments
# (utterance recording start end, in seconds; then wav.scp has recordings). Stage 1 checks all of it and tells a fault
# with its file and line. Sampling rates other than --fs are resampled; recordings must have one channel.
#
#   up to some hours of speech     the defaults below, on a CPU or --ngpu 1
#   some ten hours or more         --ngpu 1 --nbpe 500 --asr_config conf/librispeech_100/train_ebranchformer_mega.yaml
#   little training data           --speed_perturb_factors "0.9 1.0 1.1"
#   writing without blanks         --token_type char
#   start from another model       --pretrained_model exp/…/valid.loss.ave.pth:encoder:encoder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

train_set=train
valid_set=valid
test_sets="test"

../../TEMPLATE/asr1/asr.sh \
    --fs 16k \
    --token_type bpe \
    --nbpe 100 \
    --asr_config conf/train_mega.yaml \
    --inference_config conf/decode_maes.yaml \
    --local_data_opts "${train_set} ${valid_set} ${test_sets}" \
    --train_set "${train_set}" \
    --valid_set "${valid_set}" \
    --test_sets "${test_sets}" \
    "$@"
