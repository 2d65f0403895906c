#!/usr/bin/env bash
# Stage 1: LibriSpeech's 100-hour part and its dev and test sets, downloaded into downloads/ (7.6 GB, and as much
# extracted) or taken from a path. A download that broke off goes on when this is called again.
# Options: --python COMMAND (python3); the others are those of the command below, such as
#   local/data.sh --librispeech /corpora/LibriSpeech    or    local/data.sh --mirror cn
set -euo pipefail

python=python3
options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --python) python=${2:?--python needs a command}; shift 2 ;;
        *) options+=("$1"); shift ;;
    esac
done

set -x
# A command may be several words, so python is not quoted. The + spares old bash an error for no options.
${python} -m espnet_mega_plugin.recipe.librispeech --out data ${options[@]+"${options[@]}"}
