#!/usr/bin/env bash
# Stage 1: synthesise data/{train,dev,test,test_unseen} with espeak-ng; under half a minute on 2 cores.
# Options: --python COMMAND (python3); the others are those of the command below, such as
#   local/data.sh --seed 1 --train 200 --nj 4
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
${python} -m espnet_mega_plugin.recipe.spoken_numbers --out data ${options[@]+"${options[@]}"}
