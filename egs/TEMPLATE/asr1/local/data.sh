#!/usr/bin/env bash
# Stage 1 of one's own data: checks the sets named, data/<set>/{wav.scp,text}, and completes them. A recipe that makes
# or downloads its data does so here.
set -euo pipefail

set -x
python3 -m espnet_mega_plugin.recipe.own_data "${@/#/data/}"
