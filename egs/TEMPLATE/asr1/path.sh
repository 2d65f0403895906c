# Environment of a recipe; sourced by asr.sh with the recipe as working directory.
# A virtual environment that is already active wins, then the repository's own (.venv, made by `make`).
_repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "${_repository}/.venv/bin/python3" ]; then
    export PATH="${_repository}/.venv/bin:${PATH}"
fi
unset _repository

export LC_ALL=C.UTF-8              # one sorting order and one encoding, whatever the user's language
export PYTHONIOENCODING=UTF-8
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # jobs run side by side, one core each; training: --train_threads
# Two threads that spin while they wait made a training several times slower on a machine with other work
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
