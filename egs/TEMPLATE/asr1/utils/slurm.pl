#!/usr/bin/env bash
# The Slurm runner of cmd.sh. No Perl: ESPnet's launcher goes by the file's name (espnet2/bin/launch.py).
exec python3 -m espnet_mega_plugin.recipe.slurm "$@"
