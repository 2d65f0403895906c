#!/usr/bin/env bash
# Stage 1: AN4, downloaded into downloads/ (64 MB) or taken from a path, as data/{train_nodev,train_dev,test}.
# Options: --python COMMAND (python3); the others are those of the command below, such as
#   local/data.sh --an4 an4_sphere.tar.gz    or    local/data.sh --site espnet
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
${python} -m espnet_mega_plugin.recipe.an4 --out data ${options[@]+"${options[@]}"}
