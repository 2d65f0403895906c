#!/usr/bin/env bash
# The recipe engine: from data to scores, stage by stage, with the stage numbers, option names and folders of ESPnet's
# asr.sh (egs2/TEMPLATE/asr1). It needs pip packages alone. A corpus' run.sh calls it with that corpus' defaults:
#   egs/<corpus>/asr1/run.sh --stage 3 --stop_stage 5
# Stages: 1 data  2 speed perturbation  3 format  4 length filter  5 tokens  10 statistics  11 training
#         12 decoding  13 scoring.  Free: 6-9 language models, 14 packing, 15 upload.
set -euo pipefail

# options begin
# General
stage=1                     # First stage to run.
stop_stage=15               # Last stage to run.
skip_stages=""              # Stages to leave out, separated by blanks.
skip_data_prep=false        # Leave out stages 1 to 5.
skip_train=false            # Leave out stages 2 and 4 to 11.
skip_eval=false             # Leave out stages 12 and 13.
ngpu=0                      # GPUs for training; 0 trains on the CPU.
num_nodes=1                 # Machines for training; only 1 here, use ESPnet's own asr.sh for more.
nj=0                        # Parallel jobs of stages 2, 3 and 10; 0: one a CPU core.
inference_nj=0              # Parallel jobs of stage 12; 0: one a CPU core.
gpu_inference=false         # Decode on a GPU.
train_threads=0             # CPU threads of training; 0: what OMP_NUM_THREADS says, else one a CPU core.
dumpdir=dump                # Folder for formatted audio.
expdir=exp                  # Folder for experiments.
python="python3 -m espnet_mega_plugin.run"  # Command that starts ESPnet's modules.
# Data
local_data_opts=""          # Options for local/data.sh.
train_set=""                # Name of the training set (required).
valid_set=""                # Name of the validation set (required).
test_sets=""                # Names of the test sets, separated by blanks (required).
eval_valid_set=false        # Decode and score the validation set as well.
lang=noinfo                 # Language, a part of folder names.
speed_perturb_factors=""    # Such as "0.9 1.0 1.1"; empty: no speed perturbation.
feats_type=raw              # Features: raw (audio; features are computed in the model).
audio_format=flac           # Format of the audio of stage 3: flac or wav.
fs=16k                      # Sampling rate.
min_wav_duration=0.1        # Shorter utterances are not trained on, seconds.
max_wav_duration=20.0       # Longer utterances are not trained on, seconds.
# Tokens
token_type=bpe              # bpe, char or word.
nbpe=30                     # Number of sentencepiece tokens.
bpemode=unigram             # Kind of sentencepiece model: unigram or bpe.
bpe_nlsyms=""               # Symbols that stay whole: separated by commas, or a file.
bpe_char_cover=1.0          # Share of the characters that get a token.
nlsyms_txt=none             # File with non-linguistic symbols, for token types char and word.
cleaner=none                # Text cleaner of ESPnet: none, tacotron, jaconv, vietnamese ...
use_lm=false                # Language model; not here yet (stages 6 to 9).
# Model and training
asr_task=asr_transducer     # ESPnet task; asr_transducer alone.
asr_config=""               # Training YAML.
asr_args=""                 # Options for ESPnet's training, such as "--max_epoch 10".
asr_tag=""                  # Name of the experiment; empty: made from the configuration's name and the options.
asr_exp=""                  # Folder of the experiment; empty: <expdir>/asr_<asr_tag>.
asr_stats_dir=""            # Folder of the statistics; empty: named after the data and the tokens.
asr_speech_fold_length=800  # Frames beyond which a folded batch gets smaller (batch_type folded).
asr_text_fold_length=150    # Tokens beyond which a folded batch gets smaller (batch_type folded).
feats_normalize=global_mvn  # global_mvn, utterance_mvn or none.
pretrained_model=""         # Parameters to start from: ESPnet's --init_param.
ignore_init_mismatch=false  # Leave out parameters of pretrained_model whose shape differs.
# Decoding and scoring
inference_config=""         # Decoding YAMLs, separated by blanks or commas.
inference_args=""           # Options for ESPnet's decoding, such as "--beam_size 10".
inference_tag=""            # Name of the decoding; empty: made from the configuration's name and the options.
inference_asr_model=valid.loss.ave.pth  # Parameters to decode with.
use_streaming=false         # Decode in chunks, as the audio would come in.
decode_in_one_process=true  # Keep ESPnet loaded between decoding jobs; false: a new process for each.
score_opts=""               # Scoring: -s makes letters of different case differ.
# options end

# In braces: bash reads all of it before it starts, so editing this file does not disturb a run
{

log() { echo "$(date '+%H:%M:%S') ${*}"; }
die() { echo "asr.sh: ${*}" >&2; exit 2; }

# Show a command, then run it
run() {
    local word line="+"
    for word in "$@"; do
        [[ ${word} =~ ^[[:alnum:]_./:,=+%-]+$ ]] || word=${word@Q}
        line+=" ${word}"
    done
    echo "${line}"
    "$@"
}
# recipe NAME ...: one of the package's recipe modules
recipe() { run python3 -m "espnet_mega_plugin.recipe.$1" "${@:2}"; }

# need FILE STAGE: stop when an input is missing and say which stage makes it
need() { [ -e "$1" ] || die "$1 is missing: run stage $2 first (--stage $2)"; }

[ "$((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1]))" -ge 404 ] || die "bash ${BASH_VERSION} is too old: 4.4 or later"
[ -f path.sh ] || die "path.sh is missing in ${PWD}: run.sh must change into its recipe before it calls this"
_threads=${OMP_NUM_THREADS:-}
. ./path.sh
python3 -c 'import espnet_mega_plugin' 2>/dev/null \
    || die "$(command -v python3 || echo python3) cannot import espnet_mega_plugin: install it with 'pip install -e .' in the repository"
_given=$(python3 -m espnet_mega_plugin.recipe.options "${BASH_SOURCE[0]}" "$@") || exit 2
eval "${_given}"

# ---------------------------------------------------------------------------------------------------------------------
# Checks and names

[ -n "${train_set}" ] || die "--train_set is required"
[ -n "${valid_set}" ] || die "--valid_set is required"
[ -n "${test_sets}" ] || die "--test_sets is required"
[ "${asr_task}" = asr_transducer ] || die "--asr_task ${asr_task}: this recipe knows asr_transducer alone"
[ "${feats_type}" = raw ] || die "--feats_type ${feats_type}: only raw here; features are computed in the model"
[ "${stage}" -le 15 ] || die "--stage ${stage}: the last stage is 15"
[ "${stop_stage}" -ge "${stage}" ] || die "--stop_stage ${stop_stage} comes before --stage ${stage}: no stage would run"
[[ "${fs}" =~ ^([1-9][0-9]{3,}|[1-9][0-9]*(\.[0-9]+)?k)$ ]] \
    || die "--fs ${fs}: expected a sampling rate of at least 1000 Hz such as 16000 or 16k"
[ "${ngpu}" -ge 0 ] || die "--ngpu ${ngpu}: expected 0 (the CPU) or more"
[ "${num_nodes}" -eq 1 ] || die "--num_nodes ${num_nodes}: only 1 here; use ESPnet's own asr.sh for clusters"
! "${use_lm}" || die "--use_lm true: stages 6 (statistics), 7 (training), 8 (perplexity) and 9 (n-gram) are not here yet"
case "${audio_format}" in wav|flac) ;; *) die "--audio_format ${audio_format}: expected wav or flac" ;; esac
case "${token_type}" in bpe|char|word) ;; *) die "--token_type ${token_type}: expected bpe, char or word" ;; esac
case "${feats_normalize}" in global_mvn|utterance_mvn|none) ;;
    *) die "--feats_normalize ${feats_normalize}: expected global_mvn, utterance_mvn or none" ;; esac
case "${score_opts}" in ""|-s) ;; *) die "--score_opts ${score_opts}: only -s is known" ;; esac

cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
[ "${nj}" -gt 0 ] || nj=${cores}
[ "${inference_nj}" -gt 0 ] || inference_nj=${cores}
[ "${train_threads}" -gt 0 ] || train_threads=${_threads:-${cores}}

stem() { local name=${1##*/}; echo "${name%.*}"; }
# "--beam_size 10" -> "_beam_size10", for folder names, as ESPnet does
squeezed() { sed -e 's/--/\_/g' -e 's/[ |=/]//g' <<< "$1"; }

data_feats=${dumpdir}/${feats_type}
original_train_set=${train_set}
if [ -n "${speed_perturb_factors}" ]; then
    train_set=${train_set}_sp
fi

_lang=""; token_listdir=data/token_list
if [ "${lang}" != noinfo ]; then
    _lang=_${lang}; token_listdir=data/${lang}_token_list
fi
_tokens=${token_type}; bpemodel=none
case "${token_type}" in
    bpe)
        _tokens=bpe${nbpe}
        bpemodel=${token_listdir}/bpe_${bpemode}${nbpe}/bpe.model
        token_list=${token_listdir}/bpe_${bpemode}${nbpe}/tokens.txt ;;
    *)
        token_list=${token_listdir}/${token_type}/tokens.txt ;;
esac
_data=${feats_type}${_lang}_${_tokens}
_sp=""; [ -z "${speed_perturb_factors}" ] || _sp=_sp

if [ -z "${asr_tag}" ]; then
    asr_tag=train
    [ -z "${asr_config}" ] || asr_tag=$(stem "${asr_config}")
    asr_tag=${asr_tag}_${_data}$(squeezed "${asr_args}")${_sp}
fi
[ -n "${asr_stats_dir}" ] || asr_stats_dir=${expdir}/asr_stats_${_data}${_sp}
[ -n "${asr_exp}" ] || asr_exp=${expdir}/asr_${asr_tag}

# One tag a decoding configuration: decode_maes_asr_model_valid.loss.ave
inference_configs=${inference_config//,/ }
[ -n "${inference_configs// }" ] || inference_configs=none
inference_tags=""
for _config in ${inference_configs}; do
    if [ -n "${inference_tag}" ]; then
        [ -z "${inference_tags}" ] || die "--inference_tag names one decoding, but there are several --inference_config"
        inference_tags=${inference_tag}
        continue
    fi
    _tag=inference; [ "${_config}" = none ] || _tag=$(stem "${_config}")
    ! "${use_streaming}" || _tag=${_tag}_streaming
    inference_tags+=" ${_tag}$(squeezed "${inference_args}")_asr_model_$(stem "${inference_asr_model}")"
done
inference_tags=${inference_tags# }

# Each word once: a set may be both for validation and for tests
once() { printf '%s\n' "$@" | awk '!seen[$0]++'; }

eval_sets=${test_sets}
! "${eval_valid_set}" || eval_sets="org/${valid_set} ${test_sets}"

_skipped=" ${skip_stages} 6 7 8 9 "
! "${skip_data_prep}" || _skipped+="1 2 3 4 5 "
! "${skip_train}" || _skipped+="2 4 5 6 7 8 9 10 11 "
! "${skip_eval}" || _skipped+="12 13 "
[ -n "${speed_perturb_factors}" ] || _skipped+="2 "

# begin N TITLE: whether stage N is to run; says so and starts its clock
begin() {
    [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ] || return 1
    case "${_skipped}" in *" $1 "*) return 1 ;; esac
    log "Stage $1: $2"
    SECONDS=0
}
end() { log "Stage $1: done in $((SECONDS / 60)) min $((SECONDS % 60)) s"; }

for _n in ${skip_stages}; do
    [[ "${_n}" =~ ^[0-9]+$ ]] || die "--skip_stages ${skip_stages}: expected numbers separated by blanks"
done
for _n in 6 7 8 9; do
    [ "${stage}" -ne "${_n}" ] || log "Stage ${_n} is kept free for language models (--use_lm), nothing to do"
done

# ---------------------------------------------------------------------------------------------------------------------

if begin 1 "data: data/{$(once "${original_train_set}" "${valid_set}" ${test_sets} | paste -sd, -)}"; then
    [ -e local/data.sh ] || die "local/data.sh is missing in ${PWD}: it makes the data directories"
    # shellcheck disable=SC2086
    run local/data.sh ${local_data_opts}
    end 1
fi

if begin 2 "speed perturbation: data/${original_train_set} -> data/${train_set}"; then
    need "data/${original_train_set}/wav.scp" 1
    recipe perturb --factors "${speed_perturb_factors}" --nj "${nj}" \
        "data/${original_train_set}" "data/${train_set}"
    end 2
fi

if begin 3 "format: data -> ${data_feats}"; then
    for _set in ${train_set} ${valid_set} ${test_sets}; do
        _stage=1; [ "${_set}" = "${original_train_set}" ] || [ "${_set}" != "${train_set}" ] || _stage=2
        need "data/${_set}/wav.scp" "${_stage}"
    done
    for _set in $(once ${train_set} ${valid_set} ${test_sets}); do
        _org=""; { [ "${_set}" != "${train_set}" ] && [ "${_set}" != "${valid_set}" ]; } || _org=/org
        recipe format_wav --nj "${nj}" --fs "${fs}" --audio_format "${audio_format}" \
            "data/${_set}" "${data_feats}${_org}/${_set}"
    done
    end 3
fi

if begin 4 "length filter: ${data_feats}/org -> ${data_feats}"; then
    for _set in "${train_set}" "${valid_set}"; do
        need "${data_feats}/org/${_set}/wav.scp" 3
        recipe filter_lengths --fs "${fs}" \
            --min_wav_duration "${min_wav_duration}" --max_wav_duration "${max_wav_duration}" \
            "${data_feats}/org/${_set}" "${data_feats}/${_set}"
    done
    end 4
fi

if begin 5 "tokens: ${token_list}"; then
    need "${data_feats}/${train_set}/text" 4
    if [ "${token_type}" = bpe ]; then
        recipe tokens --nbpe "${nbpe}" --bpemode "${bpemode}" --bpe_nlsyms "${bpe_nlsyms}" \
            --bpe_char_cover "${bpe_char_cover}" --text "${data_feats}/${train_set}/text" \
            --output_dir "$(dirname "${token_list}")"
    else
        # shellcheck disable=SC2086
        recipe jobs --log "$(dirname "${token_list}")/tokenize_text.log" -- \
            ${python} -m espnet2.bin.tokenize_text --token_type "${token_type}" \
            --input "${data_feats}/${train_set}/text" --output "${token_list}.new" --field 2- \
            --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p none --write_vocabulary true \
            --add_symbol "<blank>:0" --add_symbol "<unk>:1" --add_symbol "<sos/eos>:-1"
        run mv "${token_list}.new" "${token_list}"
    fi
    end 5
fi

# What stages 10 and 11 tell ESPnet alike
_data_options=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_list}" --bpemodel "${bpemodel}"
    --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p none
    --train_data_path_and_name_and_type "${data_feats}/${train_set}/wav.scp,speech,sound"
    --train_data_path_and_name_and_type "${data_feats}/${train_set}/text,text,text"
    --valid_data_path_and_name_and_type "${data_feats}/${valid_set}/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${data_feats}/${valid_set}/text,text,text"
)
[ -z "${asr_config}" ] || _data_options+=(--config "${asr_config}")
_model_options=(--frontend_conf "fs=${fs}")

if begin 10 "statistics: ${asr_stats_dir}"; then
    for _set in "${train_set}" "${valid_set}"; do
        need "${data_feats}/${_set}/wav.scp" 4
    done
    need "${token_list}" 5
    [ -z "${asr_config}" ] || [ -f "${asr_config}" ] || die "--asr_config ${asr_config}: no such file in ${PWD}"
    rm -f "${asr_stats_dir}/train/text_shape.${token_type}"  # written last: stage 11 takes it for a finished stage 10
    _logdir=${asr_stats_dir}/logdir
    _jobs=$(python3 -m espnet_mega_plugin.recipe.stats split --nj "${nj}" --logdir "${_logdir}" \
        --train "${data_feats}/${train_set}/wav.scp" --valid "${data_feats}/${valid_set}/wav.scp")
    # shellcheck disable=SC2086
    recipe jobs --jobs "${_jobs}" --log "${_logdir}/stats.JOB.log" -- \
        ${python} -m espnet2.bin.asr_transducer_train --collect_stats true "${_data_options[@]}" \
        --train_shape_file "${_logdir}/train.JOB.scp" --valid_shape_file "${_logdir}/valid.JOB.scp" \
        --output_dir "${_logdir}/stats.JOB" "${_model_options[@]}" ${asr_args}
    _inputs=()
    for _job in $(seq "${_jobs}"); do
        _inputs+=(--input_dir "${_logdir}/stats.${_job}")
    done
    # shellcheck disable=SC2086
    recipe jobs --log "${_logdir}/aggregate.log" -- \
        ${python} -m espnet2.bin.aggregate_stats_dirs "${_inputs[@]}" --output_dir "${asr_stats_dir}"
    recipe stats text_shapes --stats_dir "${asr_stats_dir}" --token_list "${token_list}" --token_type "${token_type}"
    end 10
fi

if begin 11 "training: ${asr_exp}"; then
    need "${asr_stats_dir}/train/text_shape.${token_type}" 10
    need "${asr_stats_dir}/train/feats_stats.npz" 10
    need "${token_list}" 5
    [ -z "${asr_config}" ] || [ -f "${asr_config}" ] || die "--asr_config ${asr_config}: no such file in ${PWD}"
    case "${feats_normalize}" in
        global_mvn)
            _model_options+=(--normalize global_mvn --normalize_conf "stats_file=${asr_stats_dir}/train/feats_stats.npz") ;;
        *)
            _model_options+=(--normalize "${feats_normalize}") ;;
    esac
    [ -z "${pretrained_model}" ] || _model_options+=(--init_param "${pretrained_model}")
    # shellcheck disable=SC2086
    OMP_NUM_THREADS=${train_threads} recipe train --asr_exp "${asr_exp}" --asr_config "${asr_config}" \
        --token_list "${token_list}" -- \
        ${python} -m espnet2.bin.asr_transducer_train --resume true "${_data_options[@]}" "${_model_options[@]}" \
        --train_shape_file "${asr_stats_dir}/train/speech_shape" \
        --train_shape_file "${asr_stats_dir}/train/text_shape.${token_type}" \
        --valid_shape_file "${asr_stats_dir}/valid/speech_shape" \
        --valid_shape_file "${asr_stats_dir}/valid/text_shape.${token_type}" \
        --fold_length "$((asr_speech_fold_length * 100))" --fold_length "${asr_text_fold_length}" \
        --ignore_init_mismatch "${ignore_init_mismatch}" --ngpu "${ngpu}" --multiprocessing_distributed true \
        --output_dir "${asr_exp}" ${asr_args}
    end 11
fi

if begin 12 "decoding: ${asr_exp}/{${inference_tags// /,}}"; then
    need "${asr_exp}/config.yaml" 11
    need "${asr_exp}/${inference_asr_model}" 11
    for _set in ${eval_sets}; do
        need "${data_feats}/${_set}/wav.scp" 3
    done
    for _config in ${inference_configs}; do
        [ "${_config}" = none ] || [ -f "${_config}" ] || die "--inference_config ${_config}: no such file in ${PWD}"
    done
    _ngpu=0; ! "${gpu_inference}" || _ngpu=1
    # ESPnet reads --streaming false as true, so it is given only where it is meant
    _streaming=""; ! "${use_streaming}" || _streaming="--streaming true"
    _worker=""; ! "${decode_in_one_process}" || _worker="${python} -m espnet_mega_plugin.recipe.worker"
    # shellcheck disable=SC2086
    recipe decode --asr_exp "${asr_exp}" --data_dir "${data_feats}" --test_sets "${eval_sets}" \
        --configs "${inference_configs}" --tags "${inference_tags}" --nj "${inference_nj}" --worker "${_worker}" -- \
        ${python} -m espnet2.bin.asr_transducer_inference --ngpu "${_ngpu}" \
        --asr_train_config "${asr_exp}/config.yaml" --asr_model_file "${asr_exp}/${inference_asr_model}" \
        ${_streaming} ${inference_args}
    end 12
fi

if begin 13 "scoring"; then
    for _tag in ${inference_tags}; do
        for _set in ${eval_sets}; do
            need "${asr_exp}/${_tag}/${_set}/text" 12
        done
    done
    _bpe=(); [ "${token_type}" != bpe ] || _bpe=(--bpemodel "${bpemodel}")
    # shellcheck disable=SC2086
    recipe score --asr_exp "${asr_exp}" --data_dir "${data_feats}" --test_sets "${eval_sets}" \
        --tags "${inference_tags}" --token_type "${token_type}" "${_bpe[@]}" --cleaner "${cleaner}" ${score_opts}
    recipe results --asr_exp "${asr_exp}" --expdir "${expdir}"
    end 13
fi

for _n in 14 15; do
    [ "${stage}" -ne "${_n}" ] || log "Stage ${_n} is kept free for packing and upload, nothing to do"
done
exit 0
}
