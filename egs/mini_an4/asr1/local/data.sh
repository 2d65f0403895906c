#!/usr/bin/env bash
# Stage 1: AN4's eight recordings as data/{train_nodev,train_dev,test}; a second.
# Options: --python COMMAND (python3); the others are those of the command below, such as
#   local/data.sh --source espnet-202611-py3-none-any.whl    or    local/data.sh --fetch
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
${python} -m espnet_mega_plugin.recipe.mini_an4 --out data ${options[@]+"${options[@]}"}
