#!/usr/bin/env bash
# The comparison of egs/README.md: prediction networks on the same encoder, data and number of epochs, three seeds each,
# MEGA's options and the losses. Run it from the recipe's folder after stages 1 to 10:
#   ./run.sh --stop_stage 10 && local/compare.sh
# Options: --train_jobs N (2) trainings side by side, one CPU thread each; --only REGEX experiments whose name matches.
# What is there already is not trained or decoded again. The table: exp/compare/README.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train_jobs=2
only=.
while [ $# -gt 0 ]; do
    case "$1" in
        --train_jobs) train_jobs=${2:?--train_jobs needs a number}; shift 2 ;;
        --only) only=${2:?--only needs a regular expression}; shift 2 ;;
        *) echo "compare.sh: unknown option $1, expected --train_jobs or --only" >&2; exit 2 ;;
    esac
done

# NAME|training YAML|options of ESPnet's training
experiments() {
    local seed decoder
    for seed in 0 1 2; do
        for decoder in mega rnn stateless; do
            echo "${decoder}_seed${seed}|conf/train_${decoder}.yaml|--seed ${seed}"
        done
    done
    local full="--seed 0 --model_conf use_k2_pruned_loss=false --model_conf"
    echo "mega_fused|conf/train_mega.yaml|${full} transducer_loss=fused"
    echo "mega_standard|conf/train_mega.yaml|${full} transducer_loss=standard"
    echo "mega_simple|conf/train_mega.yaml|--seed 0 --decoder_conf rel_pos_bias_type=simple"
    echo "mega_chunk8|conf/train_mega.yaml|--seed 0 --decoder_conf chunk_size=8"
    echo "mega_1head|conf/train_mega.yaml|--seed 0 --decoder_conf num_heads=1"
    echo "mega_1block|conf/train_mega.yaml|--seed 0 --decoder_conf num_blocks=1"
}

train() {
    local name config options
    IFS='|' read -r name config options <<< "$1"
    [ ! -e "exp/compare/asr_${name}/valid.loss.ave.pth" ] || return 0
    echo "$(date '+%H:%M:%S') training ${name}"
    ./run.sh --stage 11 --stop_stage 11 --train_threads 1 --asr_exp "exp/compare/asr_${name}" \
        --asr_config "${config}" --asr_args "${options}" > "exp/compare/${name}.log" 2>&1 \
        || { echo "compare.sh: ${name} failed, see exp/compare/${name}.log" >&2; return 1; }
}

# One job at a time, so that the real-time factors are those of one thread by itself
decode() {
    local name=$1
    shift
    echo "$(date '+%H:%M:%S') decoding ${name} ${*}"
    ./run.sh --stage 12 --stop_stage 13 --inference_nj 1 --asr_exp "exp/compare/asr_${name}" "$@" \
        >> "exp/compare/${name}.log" 2>&1 || { echo "compare.sh: see exp/compare/${name}.log" >&2; return 1; }
}

mkdir -p exp/compare
chosen=$(experiments | grep -E -- "^[^|]*(${only})") || { echo "compare.sh: no experiment matches ${only}" >&2; exit 2; }

export -f train
xargs -d '\n' -P "${train_jobs}" -I{} bash -c 'train "$1"' _ {} <<< "${chosen}"
