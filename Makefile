# What there is to do with a checkout. Each target makes its own environment in .venv first: nothing else to install.
#
#     make demo    train a small model from scratch on its own mistakes and show what came of it
#     make test    the tests that take seconds
#     make slow    the tests that take minutes
#     make kernels  every Triton kernel compiled for every GPU, and interpreted; TRITON=3.6.0 asks for that version
#     make trl     the integration into TRL, with every version of it that is supported
#     make transformers  packing and models with the oldest and the newest transformers
#     make llama-factory  LLaMA-Factory's own training on packed forests, with the versions that it wants
#     make openrlhf  OpenRLHF's DPO command on packed forests, on the CPU and without DeepSpeed
#     make axolotl  the plugin for Axolotl in Axolotl itself, which is installed beside the environment
#     make lint    style, types, layers
#     make benchmarks  exactness, speed and memory beside the peers, with a report; the quick form of it
#     make bench   our own hot paths, to see regressions between two commits
#     make picture the README's picture of the benchmarks, from their results
#     make gpu     the tests that need a GPU, then the benchmarks; DRY=1 without one
#     make sanitize  Triton kernels under compute-sanitizer, on a GPU
#     make clean   remove what these targets made
#
# On a machine that has torch, pytest and the rest, make PY=python test uses those and installs nothing.

.DELETE_ON_ERROR:
.PHONY: demo test slow kernels trl transformers llama-factory openrlhf axolotl lint bench benchmarks \
	picture gpu sanitize clean env

PYTHON ?= python3
# Alone and first: asking for "torch" together with the rest would let pip choose another one.
TORCH ?= torch==2.13.0
VENV := .venv
PY ?= $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
ENV := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.package)

demo: $(ENV)
	$(PY) -m examples.miniature

# Two processes: most tests keep one core busy, and no more.
test: $(ENV)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

slow: $(ENV)
	$(PY) -m pytest -m "slow and not gpu"

# No GPU needed. TRITON=3.6.0 puts that version beside the environment, not into it, with the NumPy of its time.
KERNELS_PATH = $(if $(TRITON),PYTHONPATH=.cache/triton-$(TRITON))
kernels: $(ENV)
	$(if $(TRITON),$(PIP) install --quiet --no-deps --target .cache/triton-$(TRITON) triton==$(TRITON) 'numpy<2.4')
	$(KERNELS_PATH) $(PY) -m tests.compiled_kernels
	$(KERNELS_PATH) TRITON_INTERPRET=1 $(PY) -m pytest tests/ops/test_triton_head.py tests/ops/test_in_forward.py \
		tests/ops/test_triton_attention.py tests/ops/test_pair_loss.py tests/ops/test_ragged.py

# Each version beside the environment, not into it. On CPUs 1.15 itself runs in Triton's interpreter alone, which takes
# minutes for every test.
TRL ?= 1.9.0 1.9.2 1.10.0 1.11.0 1.12.0 1.13.0 1.14.0 1.14.2 1.15.0 1.16.0
TRL_FEW := removing_it_restores or ld_alpha or refused
trl: $(ENV)
	for version in $(TRL); do \
		$(PIP) install --quiet --upgrade --no-deps --target .cache/trl-$$version trl==$$version && \
		PYTHONPATH=.cache/trl-$$version $(PY) -m pytest tests/integrations/test_trl.py \
			-k "$$([ $$version = 1.15.0 ] && echo '$(TRL_FEW)')" || exit 1; \
	done

# Versions of their own, beside the environment and first on the path.
llama-factory: $(ENV) .cache/llama-factory/.installed
	PYTHONPATH=.cache/llama-factory $(PY) -m pytest tests/integrations/test_llama_factory.py

openrlhf: $(ENV) .cache/openrlhf/.installed
	PYTHONPATH=.cache/openrlhf $(PY) -m pytest tests/integrations/test_openrlhf.py

# OpenRLHF brings its tests along. LLaMA-Factory imports torchaudio even for text: its compiled part is made for CUDA,
# and not asked for where it is absent.
.cache/%/.installed: tests/integrations/%.txt | $(ENV)
	rm -rf $(@D)
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps --target $(@D) -r $<
	rm -rf $(@D)/tests $(@D)/torchaudio/lib/*.so
	touch $@

# Models are packed with the oldest and the newest transformers; the trainer wants the environment's.
PACKED = tests/packing tests/model tests/loss tests/invariants/test_i1_families.py tests/invariants/test_i1_exact.py \
	tests/invariants/test_i2_zero_margin.py tests/integrations/test_trl.py
transformers: $(ENV) .cache/transformers-oldest/.installed
	PYTHONPATH=.cache/transformers-oldest $(PY) -m pytest -m "not slow and not gpu" $(PACKED)
	$(PY) -m pytest -m "not slow and not gpu" $(PACKED)

# An environment that has Axolotl's versions, and finds everything else in ours.
AXOLOTL_ENV := .cache/axolotl-0.19.0
axolotl: $(ENV)
	$(PY) -m venv $(AXOLOTL_ENV)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(AXOLOTL_ENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_beside.pth"
	$(AXOLOTL_ENV)/bin/python -m pip install --quiet --no-deps -r tests/integrations/axolotl.txt
	$(AXOLOTL_ENV)/bin/python -m pytest tests/integrations/test_axolotl.py

lint: $(ENV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -c "from importlinter.cli import lint_imports_command as main; main()"

# To see a regression: run it in both commits, then `.venv/bin/pytest-benchmark compare`.
bench: $(ENV)
	$(PY) -m pytest tests/benchmarks/test_hot_paths.py --benchmark-enable --benchmark-autosave

OUTPUT ?= runs/bench
benchmarks: $(ENV)
	$(PY) -m benchmarks run --quick --output $(OUTPUT)

# Within nine minutes on one H100, with PY=python3 where the machine has torch and no network; DRY=1 walks through the
# same without a GPU.
gpu: $(ENV)
	$(PY) -m benchmarks gpu $(if $(DRY),--dry) --output $(if $(filter runs/bench,$(OUTPUT)),runs/gpu,$(OUTPUT))

# Every Triton kernel once on small shapes under compute-sanitizer, which comes with CUDA's toolkit. Without torch's
# caching allocator, in whose large blocks an access beyond a tensor would still be inside.
SANITIZED := heads_are_as_good and triton and bfloat16 and odd \
	or segment_sums and 3 and bfloat16 \
	or attention_backends_are_as_good and triton and sinks and not bfloat16-64x64-sinks \
	or attention_backends_are_as_good and triton and 256x256 \
	or i3_the_same_step
sanitize: $(ENV)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PY) -m pytest -m gpu tests/gpu/test_cuda.py -v -p no:cacheprovider -k "$(SANITIZED)"

# The picture of the README, from results that are there.
RESULTS ?= benchmarks/results/cpu-epyc-2-cores-2026-11-28
picture: $(ENV)
	$(PY) -m benchmarks plot $(RESULTS) --picture docs/benchmarks.svg

env: $(ENV)

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/.requirements: $(VENV)/.torch requirements-dev.txt
	$(PIP) install --no-deps -r requirements-dev.txt
	touch $@

# Without build isolation, so that the C++ operators are built against this torch.
$(VENV)/.package: $(VENV)/.requirements pyproject.toml $(wildcard setup.py csrc/*)
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis \
		.benchmarks .cache runs
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f stepdpo_kernels/_C*.so
