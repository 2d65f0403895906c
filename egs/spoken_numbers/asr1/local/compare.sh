#!/usr/bin/env bash
# The comparison of egs/README.md: prediction networks on the same encoder, data and number of epochs, three seeds each,
# MEGA's options, the losses and the demo's settings. Run it from the recipe's folder after stages 1 to 10:
#   ./run.sh --stop_stage 10 && local/compare.sh
# Options: --train_jobs N (2) trainings side by side, one CPU thread each; --only REGEX experiments of that name, such
# as 'mega_.*'. An experiment is some 5 to 8 minutes of one core, the whole some two hours on two.
# What is there already is not trained or decoded again. The table: exp/compare/README.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train_jobs=2
only='.*'
while [ $# -gt 0 ]; do
    case "$1" in
        --train_jobs) train_jobs=${2:?--train_jobs needs a number}; shift 2 ;;
        --only) only=${2:?--only needs a regular expression}; shift 2 ;;
        *) echo "compare.sh: unknown option $1, expected --train_jobs or --only" >&2; exit 2 ;;
    esac
done

# NAME|training YAML|options of ESPnet's training. Networks and losses are compared with fewer epochs and less CTC than
# the YAMLs have, networks with the pruned loss; demo is the YAML as it is
experiments() {
    local seed decoder mega="conf/train_mega.yaml" k2="--model_conf k2_pruned_loss_args"
    local short="--max_epoch 15 --model_conf auxiliary_ctc_weight=0.3"
    local loss="${short} --model_conf transducer_topology=regular --model_conf transducer_loss"
    local pruned="${loss}=pruned ${k2}.prune_range=5 ${k2}.loss_type=constrained ${k2}.simple_loss_scaling=0.3"
    local constrained="--model_conf transducer_topology=constrained"
    for seed in 0 1 2; do
        for decoder in mega rnn stateless; do
            echo "${decoder}_seed${seed}|conf/train_${decoder}.yaml|--seed ${seed} ${pruned}"
        done
        echo "mega_regular_seed${seed}|${mega}|--seed ${seed} ${loss}=fused"
        echo "mega_constrained_seed${seed}|${mega}|--seed ${seed} ${loss}=fused ${constrained}"
        echo "mega_demo_seed${seed}|${mega}|--seed ${seed}"
    done
    echo "mega_demo_standard_seed0|${mega}|--seed 0 --model_conf transducer_loss=standard"
    echo "rnn_demo_seed0|conf/train_rnn.yaml|--seed 0"
    for decoder in rnn stateless; do
        echo "${decoder}_constrained_seed0|conf/train_${decoder}.yaml|--seed 0 ${loss}=fused ${constrained}"
    done
    echo "mega_regular_standard_seed0|${mega}|--seed 0 ${loss}=standard"
    echo "mega_constrained_standard_seed0|${mega}|--seed 0 ${loss}=standard ${constrained}"
    echo "mega_constrained_20epochs_seed0|${mega}|--seed 0 ${loss}=fused ${constrained} --max_epoch 20"
    echo "mega_simple_seed0|${mega}|--seed 0 ${pruned} --decoder_conf rel_pos_bias_type=simple"
    echo "mega_chunk8_seed0|${mega}|--seed 0 ${pruned} --decoder_conf chunk_size=8"
    echo "mega_1head_seed0|${mega}|--seed 0 ${pruned} --decoder_conf num_heads=1"
    echo "mega_1block_seed0|${mega}|--seed 0 ${pruned} --decoder_conf num_blocks=1"
}

# train FOLDER NAME|YAML|OPTIONS [MORE OPTIONS]
train() {
    local name config options
    IFS='|' read -r name config options <<< "$2"
    [ ! -e "$1/asr_${name}/valid.loss.ave.pth" ] || return 0
    echo "$(date '+%H:%M:%S') training $1/asr_${name}"
    ./run.sh --stage 11 --stop_stage 11 --train_threads 1 --asr_exp "$1/asr_${name}" --asr_config "${config}" \
        --asr_args "${options} ${3:-}" > "$1/${name}.log" 2>&1 \
        || { echo "compare.sh: ${name} failed, see $1/${name}.log" >&2; return 1; }
}

# decode NAME OPTIONS: one job at a time, so that the real-time factors are those of one thread by itself
decode() {
    local name=$1 done="exp/compare/asr_$1/decoded_batched_$3"
    [ ! -e "${done}" ] || return 0
    echo "$(date '+%H:%M:%S') decoding ${name} ${*:2}"
    ./run.sh --stage 12 --stop_stage 13 --inference_nj 1 --asr_exp "exp/compare/asr_${name}" "${@:2}" \
        >> "exp/compare/${name}.log" 2>&1 || { echo "compare.sh: see exp/compare/${name}.log" >&2; return 1; }
    touch "${done}"
}

chosen=$(experiments | grep -E -- "^(${only})[|]") || { echo "compare.sh: no experiment matches ${only}" >&2; exit 2; }
mkdir -p exp/compare/alone

export -f train
xargs -d '\n' -P "${train_jobs}" -I{} bash -c 'train exp/compare "$1"' _ {} <<< "${chosen}"
while IFS= read -r line; do    # an epoch by itself: its time and memory
    [[ "${line%%|*}" != *_seed0 ]] || train exp/compare/alone "${line}" "--max_epoch 1"
done <<< "${chosen}"
for name in $(sed 's/|.*//' <<< "${chosen}"); do
    decode "${name}" --batched true \
        --inference_config "conf/decode_greedy_batched.yaml conf/decode_maes_batched.yaml conf/decode_tsd_batched.yaml"
    case "${name}" in
        mega_seed0 | rnn_seed0 | stateless_seed0) decode "${name}" --batched false ;;    # ESPnet's searches
    esac
done
for folder in exp/compare exp/compare/alone; do
    models=$(find "${folder}" -mindepth 2 -maxdepth 2 -path '*/asr_*_seed*/valid.loss.ave.pth' \
        | sed 's#.*/asr_##; s#_seed.*##' | sort -u)
    [ -n "${models}" ] || continue    # alone: with the first seed only
    against=$(grep -x mega <<< "${models}" || head -n 1 <<< "${models}")    # --only may have left mega out
    python3 -m espnet_mega_plugin.recipe.compare --expdir "${folder}" --data_dir dump/raw \
        --test_sets "test test_unseen" --against "${against}" --out "${folder}/README.md"
done
