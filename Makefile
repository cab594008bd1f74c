# Every command of the project. `make help` lists them.
# The first Python that is new enough; name another with make PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= smollm2-135m
# A production stack is what its environment file says; ENGINERY_STACK, the name in it, is read when a command needs it.
ENV_FILE ?= infra/.env
stack = $(or $(shell sed -n 's/^ENGINERY_STACK=//p' '$(ENV_FILE)' 2>/dev/null),$(ENGINERY_STACK),enginery)
compose := $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
COMPOSE = ENGINERY_STACK=$(stack) $(compose) --project-name $(stack) --project-directory infra --file infra/compose.yaml \
  --env-file '$(ENV_FILE)' --profile gpu
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install run test check real-test fault-test cases fuzz families engines-test service-test bench bench-abilities bench-engine bench-serving images schemas clean gpu-test \
  production-env production-up production-submit production-watch production-down production-test

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/' | expand -t 14

install: $(VENV)/.installed  ## make the environment (.venv) from constraints.txt; does nothing when it is current

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q flows stages
	@touch $@

run: install  ## the main job on a real model; RECIPE=name for another
	@$(BIN)/enginery run $(RECIPE)

test: install  ## the tests; COVERAGE=1 takes half as long again and asks for 90% branch coverage, too
	@$(if $(COVERAGE:0=),$(BIN)/coverage erase)
	@OMP_NUM_THREADS=1 $(BIN)/$(if $(COVERAGE:0=),coverage run,python) -m pytest -n 2 --dist loadfile --durations 10 $(ARGS)
	@$(if $(COVERAGE:0=),$(BIN)/coverage combine --quiet && $(BIN)/coverage report)

check: install  ## ruff, mypy --strict, import boundaries, the map of the house
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -5
	@$(BIN)/lint-imports --no-cache > /dev/null
	@$(BIN)/python -m tests.architecture

real-test: install  ## a slice on the real model: fetch to verdict, short texts
	@$(BIN)/python -m pytest -m real $(ARGS) tests/real

fault-test: install  ## whole runs, kills, pools and clusters in processes of their own
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fault -n 2 --dist loadfile --durations 5 $(ARGS) tests

cases: install  ## inputs of public reports, made anew, and the day's 20 of the fuzz: what comes out is right; ENGINERY_CASES=third for the day's third
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m case -n 2 --durations 5 $(ARGS) tests/cases tests/fuzz

fuzz: install  ## drawn checkpoints of every family beside transformers; FAMILY=llama SEED=0 COUNT=500
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --family '$(FAMILY)' --seed $(or $(SEED),0) --count $(or $(COUNT),500)

families: install  ## every family of models through every technique: a table; ARGS="Llama BERT" for some
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.families $(ARGS)

engines-test: install  ## every family of README's table as graph, engine and plan, dense and compressed; ENGINERY_ENGINES=fifth for the day's fifth
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engine -n 2 --durations 5 $(ARGS) tests/benchmarks tests/stages/export

service-test: install  ## minutes on real servers: gigabytes through S3, a run whose documents are scattered, pages in Chromium, a minute of 16 clients
	@$(BIN)/python -m pytest -m service $(ARGS) tests/services tests/flows

bench: install  ## every compression technique: loss, seconds, memory, beside peers; ONLY=int4,w8a8 for some, ARGS=--help
	@$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-abilities: install  ## what each technique keeps of the abilities, by calibration, beside peers; ONLY=channels,w8a8 ITEMS=60, ARGS=--help
	@$(BIN)/python -m tests.benchmarks.abilities $(if $(ONLY),--only $(ONLY)) $(if $(ITEMS),--items $(ITEMS)) $(ARGS)

bench-engine: install  ## the last main job's engine beside the dense model, by the stage bench; ARGS=--help
	@$(BIN)/python -m tests.bench $(ARGS)

bench-serving: install  ## `enginery serve` for one client and for 16 at once: tokens per second, memory; MODEL=folder
	@$(BIN)/python -m tests.benchmarks.serving $(MODEL) $(ARGS)

schemas: install  ## write the JSON Schemas that ship with the package
	@$(BIN)/python -m flows.commands.schema

images:  ## build the container images; TORCH_INDEX and TRT choose the torch build and the TensorRT family, GPUS=1 adds one that executes plans
	@GPUS='$(or $(GPUS),$(shell sed -n 's/^GPUS=//p' '$(ENV_FILE)' 2>/dev/null))' docker/build.sh

production-env:  ## write infra/.env with random secrets, unless it is there (ENV_FILE=other for another stack)
	@infra/env.sh '$(ENV_FILE)'

production-up: production-env images  ## start Prefect, MLflow, PostgreSQL, Redis, S3 and the workers in containers
	@$(COMPOSE) up -d || { $(COMPOSE) logs --tail 20 set-up; exit 1; }
	@ENGINERY_STACK=$(stack) infra/await.sh

production-submit: production-env  ## run RECIPE in production and follow it to its end
	@$(COMPOSE) --profile submit run $(if $(shell test -t 0 && echo yes),,-T) --rm submit enginery run $(RECIPE) --launcher pool

production-watch: production-env  ## start runs of ARRIVAL_RECIPE for checkpoints that arrive in the bucket
	@$(COMPOSE) --profile watch up -d set-up watch

production-down:  ## stop them; what they stored stays (VOLUMES=--volumes removes it)
	@$(COMPOSE) stop flows-worker cpu-worker gpu-worker
	@docker ps --quiet --filter volume=$(stack)-scratch --filter label=io.prefect.flow-run-id | xargs -r docker kill
	@$(COMPOSE) --profile watch --profile dask --profile submit down $(VOLUMES)

production-test: install  ## the whole of production from nothing, in containers, and take it down again
	@$(BIN)/python -m pytest -m production -rs --durations 12 $(ARGS) tests/production

gpu-test: install  ## the tests that need a GPU; says so where there is none
	@$(BIN)/python -m pytest -m gpu -rs --durations 5 $(ARGS) tests

clean:  ## remove the environment, caches and outputs; the store stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis htmlcov build dist outputs .coverage .coverage.* *.egg-info
