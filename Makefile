# Every command of the README. `make` alone lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A machine without a GPU saves gigabytes with TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DATA ?= data/wikispeedia
WORK ?= work/demo
SIZES ?= 1000000
TEXT ?= merge two tables on a key
PORT ?= 9090
CLUSTER ?= 127.0.0.1:8786
TWIN ?= $(CURDIR)/.twin
RUN := .venv/bin/python
PIP := .venv/bin/pip --disable-pip-version-check install --quiet
EXTRAS := --extra pairs --extra import --extra train --extra index --extra evaluate --extra serving --extra gateway --extra demo

.PHONY: help demo real serve test test-twin test-properties test-benchmarks cluster test-cluster bench bench-encode bench-train bench-index bench-serving bench-gateway soak ablation lint lock clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make TARGET [VARIABLE=VALUE]..."
	@sed -n 's/^\([a-z-]*\):.*##/  \1:/p' $(MAKEFILE_LIST)

.venv/run: requirements/run.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "error: $(PYTHON) is not Python 3.11; give PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "installing the pinned packages into .venv (minutes, 4.5 GB)"
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) --no-deps --require-hashes -r requirements/run.lock
	@touch $@

.venv/dev: .venv/run requirements/dev.lock
	$(PIP) --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

# The sample's settings are for the sample; with one's own logs the defaults hold.
ifdef EVENTS
demo: WORK = work/own
demo: INPUT = --set 'events.paths=["$(EVENTS)"]' --set 'documents.paths=[$(if $(DOCUMENTS),"$(DOCUMENTS)")]' \
    --set 'events.description=""' --set documents.title= --set train.max_pairs= --set train.max_seq_length= \
    --set train.learning_rate=5e-5 --set train.n_dev_pairs=500 --set train.evaluations=4 --set index.exact_below=5000
else
demo: INPUT = --set 'events.paths=["$(WORK)/input/events.jsonl.gz"]' \
    --set 'documents.paths=["$(WORK)/input/documents.parquet"]'
endif

demo: .venv/run  ## the whole pipeline on docstrings and simulated readers, then the server; EVENTS=FILE DOCUMENTS=FILE: your logs
	@$(if $(EVENTS),:,test -e $(WORK)/input/events.jsonl.gz || $(RUN) -m pipeline sample --out $(WORK)/input)
	@$(RUN) -m pipeline all --config configs/demo.yaml --work $(WORK) $(INPUT)
	@$(RUN) -m serving tour --model_base_path $(WORK)/models/index --text "$(TEXT)"

real: .venv/run  ## the whole pipeline on Wikispeedia's real clicks; DATA=DIR holds SNAP's files
	@$(RUN) -m pipeline import wikispeedia $(DATA) --out work/wikispeedia/input
	@$(RUN) -m pipeline all --config configs/wikispeedia.yaml --work work/wikispeedia
	@$(RUN) -m serving tour --model_base_path work/wikispeedia/models/index --text "sea birds that cannot fly"

serve: .venv/run  ## the local server on what demo published, until Ctrl-C; WORK=DIR PORT=N
	@$(RUN) -m serving --rest_api_port=$(PORT) --model_name=index --model_base_path=$(abspath $(WORK)/models/index)

test: .venv/dev  ## the whole test suite, a file a core
	@$(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-twin: .venv/dev  ## the export in TensorFlow 2.11 with scann 1.2.9, as in the serving image; needs root and debootstrap
	@tests/twin/build $(TWIN)
	@TWIN=$(TWIN) $(RUN) -m pytest tests/test_twin.py

bench-train: .venv/dev  ## training against Sentence Transformers' trainer as it comes, on Wikispeedia's pairs; DATA=DIR
	@$(RUN) -m pipeline import wikispeedia $(DATA) --out work/wikispeedia/input
	@$(RUN) -m pipeline pairs --config configs/wikispeedia.yaml --work work/wikispeedia
	@$(RUN) benchmarks/train.py --pairs work/wikispeedia/pairs --markdown work/bench/train.md

bench-encode: .venv/dev  ## encoding against Sentence Transformers' own options, titles and 200-word passages
	@$(RUN) benchmarks/encode.py --markdown work/bench/encode.md

# What is locked and already there stays as it is: nothing that the stages run on moves.
.venv/bench-index: .venv/dev requirements/bench-index.lock
	@command -v g++ >/dev/null || { echo "error: hnswlib and annoy are compiled: apt-get install build-essential" >&2; exit 2; }
	$(PIP) --no-deps --require-hashes -r requirements/bench-index.lock
	@touch $@

bench-index: .venv/bench-index  ## the index against FAISS, hnswlib, usearch, Annoy, ScaNN and tfrs's layer on real vectors; TWIN=DIR
	@$(RUN) benchmarks/corpus.py work/bench/corpus
	@$(RUN) benchmarks/index.py $(if $(wildcard $(TWIN)/twin/ready),--twin $(TWIN)) \
	    --json work/bench/index.json --markdown work/bench/index.md --plot work/bench/index.png

bench-serving: .venv/bench-index  ## the local server under load, beside its graph in process and a FastAPI server
	@test -e work/bench/corpus/queries.npy || $(RUN) benchmarks/corpus.py work/bench/corpus
	@$(RUN) benchmarks/serving.py --markdown work/bench/serving.md --plot work/bench/serving.png

bench-gateway: .venv/dev  ## search for people: gateway, encoder and titles; then servers killed under load; wants wrk and hey
	@$(RUN) benchmarks/gateway.py --json work/bench/gateway.json --markdown work/bench/gateway.md --plot work/bench/gateway.png
	@$(RUN) benchmarks/gateway_rehearsal.py --markdown work/bench/rehearsal.md --plot work/bench/rehearsal.png

soak: .venv/dev  ## the local server: a million requests, 20 reloads under load, 100,000 hostile requests; half an hour
	@$(RUN) -m pytest -m soak tests/test_soak.py tests/test_reload.py tests/test_server_fuzz.py --timeout 3600

ablation: .venv/dev  ## negatives, losses and prefixes on Wikispeedia, a model each: an hour on two cores; DATA=DIR
	@$(RUN) -m pipeline import wikispeedia $(DATA) --out work/wikispeedia/input
	@$(RUN) benchmarks/ablation.py --config configs/wikispeedia.yaml --work work/ablation --pairs 6000 \
	    --set train.evaluations=1 --set train.n_dev_pairs=100 --markdown work/ablation/table.md

bench: .venv/dev  ## stage pairs against textbook Beam, polars, DuckDB and pandas; SIZES="1000000 5000000 50000000"
	@$(RUN) benchmarks/pairs.py --events $(SIZES) --markdown work/bench/pairs.md

# Who reaches a scheduler or a worker can run code in it, so they listen on this machine alone.
cluster: HOST = $(firstword $(subst :, ,$(CLUSTER)))
cluster: LISTEN = --host $(HOST) --dashboard-address $(HOST):0
cluster: .venv/dev  ## a Dask scheduler and two workers for --runner dask, until Ctrl-C; CLUSTER=HOST:PORT
	@trap 'exit 0' INT TERM; trap 'kill $$scheduler 2> /dev/null; wait' EXIT; \
	$(RUN) -m dask scheduler --port $(lastword $(subst :, ,$(CLUSTER))) $(LISTEN) & scheduler=$$!; \
	$(RUN) -m dask worker tcp://$(CLUSTER) --nworkers 2 --nthreads 1 --death-timeout 60 $(LISTEN)

test-properties: .venv/dev  ## sessions against Beam's own windows and themselves, 2,000 drawn logs a property
	@HYPOTHESIS_CASES=2000 POLARS_MAX_THREADS=1 $(RUN) -m pytest tests/test_session_properties.py

test-benchmarks: .venv/dev  ## the scripts of benchmarks/, each run on little
	@$(RUN) -m pytest -m benchmark tests/test_benchmarks.py tests/test_index_benchmarks.py tests/test_serving_benchmark.py \
	    tests/test_gateway_benchmark.py tests/test_compare.py tests/test_train.py

test-cluster: .venv/dev  ## stages pairs and encode on a Dask cluster, a worker killed on the way: the same bytes
	@$(RUN) -m pytest -m cluster tests/test_cluster.py

lint: .venv/dev  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy pipeline serving

lock: .venv/dev  ## pin the newest allowed packages anew
	@.venv/bin/python -m venv work/lock && work/lock/bin/pip install --quiet pip-tools
	@for lock in run dev bench-index; do work/lock/bin/pip-compile --quiet --upgrade --generate-hashes --no-annotate \
	    --no-header --no-emit-index-url --no-emit-find-links --strip-extras --unsafe-package torch \
	    $$(case $$lock in run) echo "$(EXTRAS)";; dev) echo "--extra dev --extra cluster -c requirements/run.lock";; \
	        *) echo "--extra $$lock -c requirements/run.lock";; esac) \
	    --output-file requirements/$$lock.lock setup.cfg; done

clean:  ## remove the environment and everything made, but the twin's mounted root
	rm -rf .venv work build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
