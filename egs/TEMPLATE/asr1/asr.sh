#!/usr/bin/env bash
# The recipe engine: from data to scores, stage by stage, with the stage numbers, option names and folders of ESPnet's
# asr.sh (egs2/TEMPLATE/asr1). It needs pip packages alone. A corpus' run.sh calls it with that corpus' defaults:
#   egs/<corpus>/asr1/run.sh --stage 3 --stop_stage 5
# Stages: 1 data  2 speed perturbation  3 format  4 length filter  5 tokens  6-8 language model (--use_lm true)
#         9 n-gram (--use_ngram true)  10 statistics  11 training  12 decoding  13 scoring
#         14 packing (--skip_packing false)  15 upload (--skip_upload_hf false)
# Where commands run, this machine or a cluster, is said in cmd.sh.
set -euo pipefail

# options begin
# General
stage=1                     # First stage to run.
stop_stage=15               # Last stage to run.
skip_stages=""              # Stages to leave out, separated by blanks.
skip_data_prep=false        # Leave out stages 1 to 5.
skip_train=false            # Leave out stages 2 and 4 to 11.
skip_eval=false             # Leave out stages 12 and 13.
skip_packing=true           # Leave out stage 14.
skip_upload_hf=true         # Leave out stage 15.
ngpu=0                      # GPUs for training, of each machine; 0 trains on the CPU.
num_nodes=1                 # Machines for training; more than one needs a cluster in cmd.sh.
nj=0                        # Parallel jobs of stages 2, 3, 6 and 10; 0: one a CPU core.
inference_nj=0              # Parallel jobs of stage 12; 0: one a CPU core.
gpu_inference=false         # Decode on a GPU, and compute the language model's perplexity there.
train_threads=0             # CPU threads of a training process; 0: OMP_NUM_THREADS, else one a core; on a cluster one.
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
bpe_train_text=""           # Kaldi text for sentencepiece; empty: that of the training set.
bpe_nlsyms=""               # Symbols that stay whole: separated by commas, or a file.
bpe_char_cover=1.0          # Share of the characters that get a token.
nlsyms_txt=none             # File with non-linguistic symbols, for token types char and word.
cleaner=none                # Text cleaner of ESPnet: none, tacotron, jaconv, vietnamese ...
# Language models
use_lm=false                # Train a language model (stages 6 to 8) and decode with it.
lm_config=""                # Its training YAML.
lm_args=""                  # Options for its training, such as "--max_epoch 10".
lm_tag=""                   # Name of its experiment; empty: made from the configuration's name and the options.
lm_exp=""                   # Folder of its experiment; empty: <expdir>/lm_<lm_tag>.
lm_stats_dir=""             # Folder of its statistics; empty: named after the tokens.
lm_train_text=""            # Kaldi texts to train on, separated by blanks; empty: that of the training set.
lm_dev_text=""              # Kaldi text to validate on; empty: that of the validation set.
lm_test_text=""             # Kaldi text for stage 8; empty: that of the first test set.
lm_fold_length=150          # Tokens beyond which a folded batch gets smaller (batch_type folded).
num_splits_lm=1             # Parts of the training text, one in memory at a time.
inference_lm=valid.loss.ave.pth  # Parameters of the language model to decode with.
use_ngram=false             # Estimate an n-gram (stage 9).
ngram_num=3                 # Its order.
ngram_units=token           # What it counts: token (the recogniser's, for decoding) or word.
ngram_exp=""                # Its folder; empty: <expdir>/ngram.
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
num_splits_asr=1            # Parts of the training set, whose lists are in memory one at a time.
pretrained_model=""         # Parameters to start from: ESPnet's --init_param.
ignore_init_mismatch=false  # Leave out parameters of pretrained_model whose shape differs.
# Decoding and scoring
inference_config=""         # Decoding YAMLs, separated by blanks or commas.
inference_args=""           # Options for ESPnet's decoding, such as "--beam_size 10".
inference_tag=""            # Name of the decoding; empty: made from the configuration's name and the options.
inference_asr_model=valid.loss.ave.pth  # Parameters to decode with.
use_streaming=false         # Decode in chunks, as the audio would come in.
batched=false               # Decode in batches with the plugin's own search; without ESPnet's default search, which it lacks.
decode_in_one_process=true  # Keep ESPnet loaded between decoding jobs; false: a new process for each.
score_opts=""               # Scoring: -s makes letters of different case differ.
local_score_opts=""         # Options for local/score.sh, which runs after scoring where a recipe has it.
# Upload
hf_repo=""                  # Repository on the hub, user/name (stage 15).
hf_license=cc-by-4.0        # Licence of the model, as the hub spells it.
upload_dry_run=false        # Make the folder that would be sent, list it, send nothing.
# Not here
# not --use_k2: k2 decodes ESPnet's CTC and attention models, not transducers
# not --use_word_lm: ESPnet has no word language model for decoding either; --token_type word has words for tokens
# not --use_lightning: ESPnet's Lightning trainer is for its task asr alone
# not --use_maskctc: Mask-CTC is another model than a transducer
# not --g2p: phonemes (token type phn) are for speech synthesis
# not --oov: the symbols are ESPnet's own, <blank>, <unk> and <sos/eos>
# not --blank: the symbols are ESPnet's own, <blank>, <unk> and <sos/eos>
# not --sos_eos: the symbols are ESPnet's own, <blank>, <unk> and <sos/eos>
# not --bpe_input_sentence_size: sentencepiece reads all of the text; a shorter one can be given as --bpe_train_text
# not --batch_size: ESPnet's command decodes one utterance at a time; --batched true decodes batches
# not --inference_ngram: --ngram_exp and --ngram_num name the n-gram
# not --download_model: unpack the model and name its folder with --asr_exp, see egs/README.md
# not --skip_upload: it is two options, --skip_packing and --skip_upload_hf
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
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=${_here}/utils:${PATH}
if [ -f cmd.sh ]; then . ./cmd.sh; else . "${_here}/cmd.sh"; fi
python3 -c 'import espnet_mega_plugin' 2>/dev/null \
    || die "$(command -v python3 || echo python3) cannot import espnet_mega_plugin: install it with 'pip install -e .' in the repository"
printf -v _call '%q ' "${_here}/asr.sh" "$@"
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
[ "${num_nodes}" -ge 1 ] || die "--num_nodes ${num_nodes}: expected 1 or more"
for _cmd in train_cmd cuda_cmd decode_cmd; do
    [ -n "${!_cmd:-}" ] || die "cmd.sh does not set ${_cmd}"
    [ -n "$(command -v "${!_cmd%% *}")" ] || die "cmd.sh: ${_cmd}=${!_cmd}: no such command"
done
# local COMMAND: whether it runs its jobs on this machine
is_local() { local name=${1%% *}; case "${name##*/}" in run.pl|stdout.pl) ;; *) return 1 ;; esac; }
[ "${num_nodes}" -eq 1 ] || ! is_local "${cuda_cmd}" \
    || die "--num_nodes ${num_nodes}: cuda_cmd in cmd.sh runs on this machine alone; choose a cluster there (slurm)"
for _n in num_splits_lm num_splits_asr ngram_num; do
    [ "${!_n}" -ge 1 ] || die "--${_n} ${!_n}: expected 1 or more"
done
case "${ngram_units}" in token|word) ;; *) die "--ngram_units ${ngram_units}: expected token or word" ;; esac
case "${audio_format}" in wav|flac) ;; *) die "--audio_format ${audio_format}: expected wav or flac" ;; esac
case "${token_type}" in bpe|char|word) ;; *) die "--token_type ${token_type}: expected bpe, char or word" ;; esac
case "${feats_normalize}" in global_mvn|utterance_mvn|none) ;;
    *) die "--feats_normalize ${feats_normalize}: expected global_mvn, utterance_mvn or none" ;; esac
case "${score_opts}" in ""|-s) ;; *) die "--score_opts ${score_opts}: only -s is known" ;; esac

cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
[ "${nj}" -gt 0 ] || nj=${cores}
[ "${inference_nj}" -gt 0 ] || inference_nj=${cores}
[ "${train_threads}" -gt 0 ] || ! is_local "${cuda_cmd}" || train_threads=${_threads:-${cores}}

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

_lm_data=${_lang#_}; [ -z "${_lm_data}" ] || _lm_data+=_
_lm_data+=${_tokens}
if [ -z "${lm_tag}" ]; then
    lm_tag=train
    [ -z "${lm_config}" ] || lm_tag=$(stem "${lm_config}")
    lm_tag=${lm_tag}_${_lm_data}$(squeezed "${lm_args}")
fi
[ -n "${lm_stats_dir}" ] || lm_stats_dir=${expdir}/lm_stats_${_lm_data}
[ -n "${lm_exp}" ] || lm_exp=${expdir}/lm_${lm_tag}
[ -n "${ngram_exp}" ] || ngram_exp=${expdir}/ngram
[ -n "${bpe_train_text}" ] || bpe_train_text=${data_feats}/${train_set}/text
[ -n "${lm_train_text}" ] || lm_train_text=${data_feats}/${train_set}/text
[ -n "${lm_dev_text}" ] || lm_dev_text=${data_feats}/${valid_set}/text
[ -n "${lm_test_text}" ] || lm_test_text=${data_feats}/${test_sets%% *}/text

# One tag a decoding configuration: decode_maes_asr_model_valid.loss.ave
inference_configs=${inference_config//,/ }
[ -n "${inference_configs// }" ] || inference_configs=none
if "${batched}"; then  # recipes name ESPnet's default search, which is not there in batches
    _kept=""
    for _config in ${inference_configs}; do
        if [ -f "${_config}" ] && grep -Eq '^[^#]*search_type:[[:space:]]*["'\'']?default' "${_config}"; then
            log "--batched true: ${_config} asks for ESPnet's default search, which is not there in batches: left out"
        else
            _kept+=" ${_config}"
        fi
    done
    if [ -z "${_kept}" ]; then
        _kept=conf/decode_maes.yaml
        log "--batched true: ${_kept} in its place"
    fi
    inference_configs=${_kept# }
fi
inference_tags=""
for _config in ${inference_configs}; do
    if [ -n "${inference_tag}" ]; then
        [ -z "${inference_tags}" ] || die "--inference_tag names one decoding, but there are several --inference_config"
        inference_tags=${inference_tag}
        continue
    fi
    _tag=inference; [ "${_config}" = none ] || _tag=$(stem "${_config}")
    ! "${use_streaming}" || _tag=${_tag}_streaming
    ! "${batched}" || [[ "${_tag}" == *_batched ]] || _tag=${_tag}_batched
    _tag+=$(squeezed "${inference_args}")
    ! "${use_lm}" || _tag+=_lm_${lm_exp##*/}_$(stem "${inference_lm}")
    { ! "${use_ngram}" || ! "${batched}"; } || _tag+=_ngram_${ngram_exp##*/}_${ngram_num}gram
    _tag+=_asr_model_$(stem "${inference_asr_model}")
    [[ " ${inference_tags} " != *" ${_tag} "* ]] \
        || die "--inference_config: ${inference_configs// /, } hold two that would both write ${_tag}; name one of them"
    inference_tags+=" ${_tag}"
done
inference_tags=${inference_tags# }

# Each word once: a set may be both for validation and for tests
once() { printf '%s\n' "$@" | awk '!seen[$0]++'; }

eval_sets=${test_sets}
! "${eval_valid_set}" || eval_sets="org/${valid_set} ${test_sets}"

_skipped=" ${skip_stages} "
! "${skip_data_prep}" || _skipped+="1 2 3 4 5 "
! "${skip_train}" || _skipped+="2 4 5 6 7 8 9 10 11 "
! "${skip_eval}" || _skipped+="12 13 "
[ -n "${speed_perturb_factors}" ] || _skipped+="2 "
"${use_lm}" || _skipped+="6 7 8 "
"${use_ngram}" || _skipped+="9 "
! "${skip_packing}" || _skipped+="14 "
! "${skip_upload_hf}" || _skipped+="15 "

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
# A stage that was asked for by its number and is switched off says so
case "${stage}" in
    6|7|8) "${use_lm}" || log "Stage ${stage} is left out: --use_lm true runs it" ;;
    9) "${use_ngram}" || log "Stage 9 is left out: --use_ngram true runs it" ;;
    14) ! "${skip_packing}" || log "Stage 14 is left out: --skip_packing false runs it" ;;
    15) ! "${skip_upload_hf}" || log "Stage 15 is left out: --skip_upload_hf false runs it" ;;
esac

# resume_with STAGE FOLDER: leave a run.sh in the folder that goes on from that stage
resume_with() {
    mkdir -p "$2"
    printf '#!/usr/bin/env bash\ncd %q && exec %s --stage %s "$@"\n' "${PWD}" "${_call}" "$1" > "$2/run.sh"
    chmod +x "$2/run.sh"
}

# training EXP CONFIG COMMAND...: one of ESPnet's training commands, on this machine or through ESPnet's launcher
training() {
    local exp=$1 config=$2 cmd threads=(); shift 2
    if [ "${num_nodes}" -eq 1 ] && is_local "${cuda_cmd}"; then
        OMP_NUM_THREADS=${train_threads} recipe train --exp "${exp}" --config "${config}" \
            --token_list "${token_list}" -- "$@" --ngpu "${ngpu}" --multiprocessing_distributed true
    else
        cmd="${cuda_cmd} --name ${exp##*/}"
        if [ "${train_threads}" -gt 0 ]; then  # a job has an environment of its own, and the CPUs that it asks for
            cmd+=" --num_threads $((train_threads * (ngpu > 1 ? ngpu : 1)))"
            threads=(env "OMP_NUM_THREADS=${train_threads}")
        fi
        # shellcheck disable=SC2086
        recipe train --launcher --exp "${exp}" --config "${config}" \
            --token_list "${token_list}" -- ${python} -m espnet2.bin.launch \
            --cmd "${cmd}" --log "${exp}/train.log" --ngpu "${ngpu}" \
            --num_nodes "${num_nodes}" --init_file_prefix "${exp}/.dist_init_" --multiprocessing_distributed true -- \
            ${threads[@]+"${threads[@]}"} "$@"
    fi
}

# aggregate LOGDIR JOBS FOLDER: the jobs' statistics as one
aggregate() {
    local inputs=() job
    for job in $(seq "$2"); do
        inputs+=(--input_dir "$1/stats.${job}")
    done
    # shellcheck disable=SC2086
    run ${train_cmd} "$1/aggregate.log" \
        ${python} -m espnet2.bin.aggregate_stats_dirs "${inputs[@]}" --output_dir "$3"
}

# split_lists FOLDER PARTS FILE...: each file in so many parts, for --multiple_iterator
split_lists() {
    local folder=$1 parts=$2; shift 2
    # shellcheck disable=SC2086
    run ${train_cmd} "${folder}/split_scps.log" \
        ${python} -m espnet2.bin.split_scps --scps "$@" --num_splits "${parts}" --output_dir "${folder}"
}

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
    [ -f "${bpe_train_text}" ] || die "--bpe_train_text ${bpe_train_text}: no such file in ${PWD}"
    if [ "${token_type}" = bpe ]; then
        recipe tokens --nbpe "${nbpe}" --bpemode "${bpemode}" --bpe_nlsyms "${bpe_nlsyms}" \
            --bpe_char_cover "${bpe_char_cover}" --text "${bpe_train_text}" \
            --output_dir "$(dirname "${token_list}")"
    else
        # shellcheck disable=SC2086
        run ${train_cmd} "$(dirname "${token_list}")/tokenize_text.log" \
            ${python} -m espnet2.bin.tokenize_text --token_type "${token_type}" \
            --input "${data_feats}/${train_set}/text" --output "${token_list}.new" --field 2- \
            --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p none --write_vocabulary true \
            --add_symbol "<blank>:0" --add_symbol "<unk>:1" --add_symbol "<sos/eos>:-1"
        run mv "${token_list}.new" "${token_list}"
    fi
    end 5
fi

# What stages 6 and 7 tell ESPnet alike
_lm_options=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_list}" --bpemodel "${bpemodel}"
    --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p none
    --valid_data_path_and_name_and_type "${lm_dev_text},text,text"
)
[ -z "${lm_config}" ] || _lm_options+=(--config "${lm_config}")
_lm_text=${data_feats}/lm_train.txt

# need_text OPTION SET STAGE: stop when the option's texts are missing; those of a set are made by a stage
need_text() {
    local text
    for text in ${!1}; do
        [ "${text}" != "${data_feats}/$2/text" ] || need "${text}" "$3"
        [ -f "${text}" ] || die "--$1 ${text}: no such file in ${PWD}"
    done
}

# join_lm_text: one text of all that the language models are trained on
join_lm_text() {
    need_text lm_train_text "${train_set}" 4
    # shellcheck disable=SC2086
    recipe lm_text --output "${_lm_text}" ${lm_train_text}
}

if begin 6 "language model statistics: ${lm_stats_dir}"; then
    need "${token_list}" 5
    need_text lm_dev_text "${valid_set}" 4
    [ -z "${lm_config}" ] || [ -f "${lm_config}" ] || die "--lm_config ${lm_config}: no such file in ${PWD}"
    join_lm_text
    rm -f "${lm_stats_dir}/train/text_shape.${token_type}"  # written last: stage 7 takes it for a finished stage 6
    _logdir=${lm_stats_dir}/logdir
    _jobs=$(python3 -m espnet_mega_plugin.recipe.stats split --nj "${nj}" --logdir "${_logdir}" \
        --train "${_lm_text}" --valid "${lm_dev_text}")
    # shellcheck disable=SC2086
    run ${train_cmd} "JOB=1:${_jobs}" "${_logdir}/stats.JOB.log" \
        ${python} -m espnet2.bin.lm_train --collect_stats true "${_lm_options[@]}" \
        --train_data_path_and_name_and_type "${_lm_text},text,text" \
        --train_shape_file "${_logdir}/train.JOB.scp" --valid_shape_file "${_logdir}/valid.JOB.scp" \
        --output_dir "${_logdir}/stats.JOB" ${lm_args}
    aggregate "${_logdir}" "${_jobs}" "${lm_stats_dir}"
    recipe stats text_shapes --stats_dir "${lm_stats_dir}" --token_list "${token_list}" --token_type "${token_type}"
    end 6
fi

if begin 7 "language model training: ${lm_exp}"; then
    need "${lm_stats_dir}/train/text_shape.${token_type}" 6
    need "${_lm_text}" 6
    [ -z "${lm_config}" ] || [ -f "${lm_config}" ] || die "--lm_config ${lm_config}: no such file in ${PWD}"
    if [ "${num_splits_lm}" -gt 1 ]; then
        split_lists "${lm_stats_dir}/splits${num_splits_lm}" "${num_splits_lm}" \
            "${_lm_text}" "${lm_stats_dir}/train/text_shape.${token_type}"
        _splits=${lm_stats_dir}/splits${num_splits_lm}
        _lm_options+=(--multiple_iterator true
            --train_data_path_and_name_and_type "${_splits}/lm_train.txt,text,text"
            --train_shape_file "${_splits}/text_shape.${token_type}")
    else
        _lm_options+=(--train_data_path_and_name_and_type "${_lm_text},text,text"
            --train_shape_file "${lm_stats_dir}/train/text_shape.${token_type}")
    fi
    resume_with 7 "${lm_exp}"
    # shellcheck disable=SC2086
    training "${lm_exp}" "${lm_config}" \
        ${python} -m espnet2.bin.lm_train --resume true "${_lm_options[@]}" \
        --valid_shape_file "${lm_stats_dir}/valid/text_shape.${token_type}" \
        --fold_length "${lm_fold_length}" --output_dir "${lm_exp}" ${lm_args}
    end 7
fi

if begin 8 "perplexity of ${lm_test_text}"; then
    need "${lm_exp}/config.yaml" 7
    need "${lm_exp}/${inference_lm}" 7
    need_text lm_test_text "${test_sets%% *}" 3
    _ngpu=0; _cmd=${train_cmd}
    if "${gpu_inference}"; then _ngpu=1; _cmd=${cuda_cmd}; fi
    # shellcheck disable=SC2086
    run ${_cmd} --gpu "${_ngpu}" "${lm_exp}/perplexity_test/lm_calc_perplexity.log" \
        ${python} -m espnet2.bin.lm_calc_perplexity --ngpu "${_ngpu}" \
        --data_path_and_name_and_type "${lm_test_text},text,text" \
        --train_config "${lm_exp}/config.yaml" --model_file "${lm_exp}/${inference_lm}" \
        --output_dir "${lm_exp}/perplexity_test"
    echo "perplexity of ${lm_test_text}: $(< "${lm_exp}/perplexity_test/ppl")"
    end 8
fi

if begin 9 "${ngram_num}-gram: ${ngram_exp}"; then
    join_lm_text
    _texts=()
    for _text in $(once "${lm_dev_text}" "${lm_test_text}"); do
        [ ! -f "${_text}" ] || _texts+=(--test_text "${_text}")
    done
    [ "${token_type}" != bpe ] || need "${bpemodel}" 5
    recipe ngram --order "${ngram_num}" --text "${_lm_text}" "${_texts[@]}" --units "${ngram_units}" \
        --token_type "${token_type}" --bpemodel "${bpemodel}" --non_linguistic_symbols "${nlsyms_txt}" \
        --cleaner "${cleaner}" --output "${ngram_exp}/${ngram_num}gram.arpa"
    end 9
fi

# What stages 10 and 11 tell ESPnet alike
_data_options=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_list}" --bpemodel "${bpemodel}"
    --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p none
    --valid_data_path_and_name_and_type "${data_feats}/${valid_set}/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${data_feats}/${valid_set}/text,text,text"
)
[ -z "${asr_config}" ] || _data_options+=(--config "${asr_config}")
_model_options=(--frontend_conf "fs=${fs}")
_whole_set=(
    --train_data_path_and_name_and_type "${data_feats}/${train_set}/wav.scp,speech,sound"
    --train_data_path_and_name_and_type "${data_feats}/${train_set}/text,text,text"
)

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
    run ${train_cmd} "JOB=1:${_jobs}" "${_logdir}/stats.JOB.log" \
        ${python} -m espnet2.bin.asr_transducer_train --collect_stats true "${_data_options[@]}" "${_whole_set[@]}" \
        --train_shape_file "${_logdir}/train.JOB.scp" --valid_shape_file "${_logdir}/valid.JOB.scp" \
        --output_dir "${_logdir}/stats.JOB" "${_model_options[@]}" ${asr_args}
    aggregate "${_logdir}" "${_jobs}" "${asr_stats_dir}"
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
    if [ "${num_splits_asr}" -gt 1 ]; then
        _splits=${asr_stats_dir}/splits${num_splits_asr}
        split_lists "${_splits}" "${num_splits_asr}" \
            "${data_feats}/${train_set}/wav.scp" "${data_feats}/${train_set}/text" \
            "${asr_stats_dir}/train/speech_shape" "${asr_stats_dir}/train/text_shape.${token_type}"
        _train_set=(--multiple_iterator true
            --train_data_path_and_name_and_type "${_splits}/wav.scp,speech,sound"
            --train_data_path_and_name_and_type "${_splits}/text,text,text"
            --train_shape_file "${_splits}/speech_shape" --train_shape_file "${_splits}/text_shape.${token_type}")
    else
        _train_set=("${_whole_set[@]}"
            --train_shape_file "${asr_stats_dir}/train/speech_shape"
            --train_shape_file "${asr_stats_dir}/train/text_shape.${token_type}")
    fi
    resume_with 11 "${asr_exp}"
    # shellcheck disable=SC2086
    training "${asr_exp}" "${asr_config}" \
        ${python} -m espnet2.bin.asr_transducer_train --resume true "${_data_options[@]}" "${_model_options[@]}" \
        "${_train_set[@]}" \
        --valid_shape_file "${asr_stats_dir}/valid/speech_shape" \
        --valid_shape_file "${asr_stats_dir}/valid/text_shape.${token_type}" \
        --fold_length "$((asr_speech_fold_length * 100))" --fold_length "${asr_text_fold_length}" \
        --ignore_init_mismatch "${ignore_init_mismatch}" --output_dir "${asr_exp}" ${asr_args}
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
    _lm=()
    if "${use_lm}"; then
        need "${lm_exp}/config.yaml" 7
        need "${lm_exp}/${inference_lm}" 7
        _lm=(--lm_train_config "${lm_exp}/config.yaml" --lm_file "${lm_exp}/${inference_lm}")
    fi
    if "${use_ngram}" && "${batched}"; then  # ESPnet's transducer search takes none
        need "${ngram_exp}/${ngram_num}gram.arpa" 9
        _lm+=(--ngram_file "${ngram_exp}/${ngram_num}gram.arpa")
    fi
    # ESPnet reads --streaming false as true, so it is given only where it is meant
    _streaming=""; ! "${use_streaming}" || _streaming="--streaming true"
    _worker=""; ! "${decode_in_one_process}" || _worker="${python} -m espnet_mega_plugin.recipe.worker"
    _command=(espnet2.bin.asr_transducer_inference)
    ! "${batched}" || _command=(espnet_mega_plugin.decode --log_level INFO --progress none)
    _cmd=${decode_cmd}; ! "${gpu_inference}" || _cmd=${cuda_cmd}
    _submit=""; is_local "${_cmd}" || _submit="${_cmd} --gpu ${_ngpu}"
    # shellcheck disable=SC2086
    recipe decode --asr_exp "${asr_exp}" --data_dir "${data_feats}" --test_sets "${eval_sets}" \
        --configs "${inference_configs}" --tags "${inference_tags}" --nj "${inference_nj}" --worker "${_worker}" \
        ${_submit:+--submit "${_submit}"} -- \
        ${python} -m "${_command[@]}" --ngpu "${_ngpu}" \
        --asr_train_config "${asr_exp}/config.yaml" --asr_model_file "${asr_exp}/${inference_asr_model}" \
        ${_lm[@]+"${_lm[@]}"} ${_streaming} ${inference_args}
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
    recipe rtf --asr_exp "${asr_exp}" --data_dir "${data_feats}" --test_sets "${eval_sets}" \
        --tags "${inference_tags}" --fs "${fs}"
    # shellcheck disable=SC2086
    [ ! -x local/score.sh ] || run local/score.sh ${local_score_opts} "${asr_exp}"
    recipe results --asr_exp "${asr_exp}" --expdir "${expdir}"
    end 13
fi

_pack=${asr_exp}/${asr_exp##*/}_${inference_asr_model%.*}.zip
if begin 14 "packing: ${_pack}"; then
    need "${asr_exp}/config.yaml" 11
    need "${asr_exp}/${inference_asr_model}" 11
    _options=(); _if_there=()
    if "${use_lm}"; then
        need "${lm_exp}/config.yaml" 7
        need "${lm_exp}/${inference_lm}" 7
        _options+=(--lm_train_config "${lm_exp}/config.yaml" --lm_file "${lm_exp}/${inference_lm}")
        _if_there+=(--if_there "${lm_exp}/perplexity_test/ppl" --if_there "${lm_exp}/images")
    fi
    [ "${feats_normalize}" != global_mvn ] || _options+=(--option "${asr_stats_dir}/train/feats_stats.npz")
    [ "${token_type}" != bpe ] || _options+=(--option "${bpemodel}")
    [ "${nlsyms_txt}" = none ] || _options+=(--option "${nlsyms_txt}")
    for _config in ${inference_configs}; do
        [ "${_config}" = none ] || _if_there+=(--if_there "${_config}")
    done
    # shellcheck disable=SC2086
    recipe pack --outpath "${_pack}" --if_there "${asr_exp}/RESULTS.md" --if_there "${asr_exp}/images" \
        ${_if_there[@]+"${_if_there[@]}"} -- \
        ${python} -m espnet2.bin.pack asr --asr_train_config "${asr_exp}/config.yaml" \
        --asr_model_file "${asr_exp}/${inference_asr_model}" ${_options[@]+"${_options[@]}"}
    end 14
fi

if begin 15 "upload: ${hf_repo}"; then
    [ -n "${hf_repo}" ] || die "--hf_repo is empty: name the repository on the hub, user/name"
    need "${_pack}" 14
    _corpus=$(basename "$(dirname "${PWD}")")
    recipe hub --pack "${_pack}" --asr_exp "${asr_exp}" --folder "${expdir}/hf_${hf_repo//\//_}" \
        --repo "${hf_repo}" --corpus "${_corpus}" --lang "${lang}" --license "${hf_license}" --dry_run "${upload_dry_run}"
    end 15
fi
exit 0
}
