# make demo [VIDEO=clip.mp4]   set up, build, encode a video, show what came out; WHEEL=FILE.whl: with that, and no build
# make test                    set up, build, run all tests (and make check)
# make env                     the set-up alone: leaves a ready .venv
# make check                   ruff, mypy and clang-format
# make docs                    docs/ and the docstrings as a site in build/docs; a link that leads nowhere fails
# make hosts-test              the tests of hosts with the oldest transformers that they are for
# make coverage                the tests again, and which lines of pyvidx/ they ran: build/coverage.json
# make wheel                   dist/: a wheel with the CPU kernels, one without, and the sources; CUDA=1: one with CUDA kernels, too
# make wheel-check             the wheels of dist/ in fresh environments (several GB each)
# make hf-kernel               dist/hf-kernel: the ops for the `kernels` package of Hugging Face
# make bench                   every bench at the papers' sizes, with a table and a plot
# make cuda-check              compile the CUDA kernels for every architecture: registers, spills, shared memory
# make emu-test                run the CUDA kernels on the CPU: the op tests under every schedule and sanitizer
# make gpu-check               on a machine with an NVIDIA GPU: build, test, sanitize, bench, write bench/results
PY = .venv/bin/python
CXX_FILES = $(shell find csrc tests cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
ISA_LEVELS = v2 v3 v4 v4bf16
OLDEST = build/transformers-5.20.2
# Every test runs on one thread, those of a file in one process: they share what they made. The order of files is kept,
# so that those which take longest are not the last.
PARALLEL = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: env demo test check docs isa-test hosts-test coverage wheel wheel-check hf-kernel bench cuda-check emu-test gpu-check clean

env:
	bash cmake/env.sh

# Only what the demo needs: half the set-up. The command of a wheel is not looked for in the source tree.
demo:
	WHEEL=$(WHEEL) EXTRAS=video,cli bash cmake/env.sh
	$(if $(WHEEL),env -u PYTHONPATH .venv/bin/pyvidx,$(PY) -m pyvidx) demo --overwrite $(VIDEO)

test: env check docs
	$(PY) -m pytest tests -q -m "not slow" $(PARALLEL)
	$(MAKE) isa-test hosts-test

check:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check -q .
	$(PY) -m mypy --cache-dir build/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_FILES)

docs:
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q -f .mkdocs.yml

# The op tests at every instruction-set level this CPU has (the best one has run already).
isa-test:
	@best=$$($(PY) -c 'from pyvidx.ops import _library; print(_library.isa())'); for level in $(ISA_LEVELS); do \
	  [ $$level = $$best ] && break; echo "tests/ops at level $$level"; \
	  PYVIDX_ISA=$$level $(PY) -m pytest tests/ops -q $(PARALLEL) || exit 1; done

# The tests of hosts with the oldest transformers that they are for; all tests have run with the newest.
hosts-test:
	[ -d $(OLDEST) ] || $(PY) -m pip install -q --no-deps --target $(OLDEST) transformers==5.20.2 kernels==0.17.2 tomlkit
	PYTHONPATH=$(OLDEST) $(PY) -m pytest tests/hosts -q $(PARALLEL)

coverage:
	$(PY) -m pytest tests -q -m "not slow" $(PARALLEL) --cov --cov-report=term:skip-covered --cov-report=json:build/coverage.json

wheel:
	$(PY) cmake/make_wheel.py cpu pure source $(if $(CUDA),cuda)

wheel-check:
	$(PY) cmake/wheel_check.py --transformers 5.17.0 5.20.2 newest --floor

hf-kernel:
	$(PY) cmake/hf_kernel.py

bench: env
	mkdir -p bench/out
	$(PY) -m pytest bench -q --benchmark-json=bench/out/bench.json
	$(PY) -m pyvidx bench report bench/out/bench.json --overwrite

cuda-check:
	$(PY) cmake/cuda_check.py

emu-test:
	$(PY) -m pytest -q tests/test_cuda_emu.py

gpu-check:
	python3 bench/gpu_check.py

clean:
	rm -rf build dist bench/out pyvidx/*.so *.egg-info
