# Two commands on a fresh machine:
#   make demo     environment, then data, training, decoding and scores of egs/spoken_numbers
#   make test     environment, then the tests
# Both are safe to repeat. PYTHON names the interpreter (3.10 to 3.13), VENV the folder of the environment.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
BATCHED_CONFIGS := conf/decode_maes.yaml conf/decode_tsd.yaml conf/decode_alsd.yaml conf/decode_greedy_batched.yaml
BENCHMARKS := ema packed loss decoder search decode

.PHONY: demo test lint bench build clean help
help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | head -4

demo: $(VENV)/installed
	PATH="$(abspath $(VENV))/bin:$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" egs/spoken_numbers/asr1/run.sh $(DEMO_ARGS)
	PATH="$(abspath $(VENV))/bin:$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" egs/spoken_numbers/asr1/run.sh \
	    --inference_config "$(BATCHED_CONFIGS)" $(DEMO_ARGS) --stage 12 --stop_stage 13 --batched true

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The README's tables about speed and memory, for this machine, with one thread. On a GPU: tests/bench/gpu.py
bench: $(VENV)/installed
	for one in $(BENCHMARKS); do $(VENV)/bin/python tests/bench/bench_$$one.py || exit 1; done

build: $(VENV)/installed
	$(VENV)/bin/python -m build --outdir dist .

# pip 26.3 refuses ESPnet 202511 (Python 3.10, 3.11): a dependency of it, ci_sdr, names an address in its metadata.
# 202511 comes without the recordings of mini_an4; they are taken out of 202611's wheel, into downloads/.
$(VENV)/installed: setup.cfg pyproject.toml
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(not (3, 10) <= v[:2] <= (3, 13) and \
	    f"Python {v[0]}.{v[1]} will not do: ESPnet needs 3.10 to 3.13. Name one: make PYTHON=python3.12")'
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@old=$$($(VENV)/bin/python -c 'import sys; print(int(sys.version_info < (3, 12)))'); \
	    [ $$old = 0 ] || $(VENV)/bin/python -m pip install --quiet 'pip<26.3'
	@echo "Installing torch, ESPnet and what they need into $(VENV): some minutes, 10 GB on the way, 7 GB in the end;" \
	    "$$(df -Pk $(VENV) | awk 'NR == 2 {print int($$4 / 1048576)}') GB are free"
	$(VENV)/bin/python -m pip install --quiet --retries 10 -e '.[test]'
	$(VENV)/bin/python -m espnet_mega_plugin.recipe.mini_an4 --fetch
	@$(VENV)/bin/python -m espnet_mega_plugin doctor > $(VENV)/doctor.log 2>&1 || { cat $(VENV)/doctor.log; exit 1; }
	@date > $@

clean:
	rm -rf $(VENV) build dist *.egg-info
