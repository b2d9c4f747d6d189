# Two commands for everybody: `make demo` and `make test`. Both do all their own set-up in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The versions the project is developed with. torch's range is wide (see pyproject.toml): any other
# installed or given here is fine, e.g. make test TORCH="torch>=2.4"
TORCH  ?= torch==2.13.0
VISION ?= torchvision==0.28.0
DATA   ?= ../shared
export ACTZIP_SHARED ?= $(abspath $(DATA))

.PHONY: bench-engine help demo test setup native lint format asan tsan fuzz fuzz-onnx fuzz-interop fuzz-short test-neon wheel test-wheel clean

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## virtual environment, dependencies, native build

# torchvision first finds torch already there: its own dependency would otherwise fetch another build.
$(VENV)/.deps: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, set PYTHON=..."'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(VISION)"
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "nanobind>=2.2" "cmake>=3.22" ninja
	touch $@

$(VENV)/.ready: $(VENV)/.deps pyproject.toml CMakeLists.txt cmake/isa.cmake $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt')
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[data,onnx,numcodecs,distributed,test,dev]"
	touch $@

demo: setup ## the main job: LeNet-5 on MNIST, trained, sparsified, quantized, encoded, decoded, checked, timed
	$(BIN)/python -c 'import onnxruntime' 2>/dev/null || $(BIN)/python -m pip install -q --retries 1 "onnxruntime>=1.18" || \
	  echo "not installed: onnxruntime"
	$(BIN)/actzip reproduce recipes/lenet5-mnist/sparsify.yaml --out out/demo --fresh
	$(BIN)/python benchmarks/demo.py out/demo

# What tests need besides, without another torch. A package or a browser that cannot be had here makes its tests skip,
# with the reason; `rm .venv/.test-all` tries again.
$(VENV)/.test-all: $(VENV)/.ready .ci/packages.py
	$(BIN)/python -m pip freeze | grep -E '^(torch|torchvision)==' > $(VENV)/constraints.txt
	$(BIN)/python .ci/packages.py test-all > $(VENV)/test-all.txt
	install="$(BIN)/python -m pip install -q --retries 1 -c $(VENV)/constraints.txt"; \
	$$install -r $(VENV)/test-all.txt || \
	  while read -r package; do $$install "$$package" || echo "not installed: $$package"; done < $(VENV)/test-all.txt
	command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  export DEBIAN_FRONTEND=noninteractive; install="apt-get install -y --no-install-recommends"; \
	  test "$$(id -u)" = 0 && timeout 60 apt-get update && timeout 300 $$install --download-only chromium && $$install chromium; \
	} >/dev/null 2>&1 || echo "not installed: Chromium"
	touch $@

# A process a core (four at most), each with one thread of torch, file by file.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
test: setup $(VENV)/.test-all ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile
	PATH="$(abspath $(BIN)):$$PATH" $(MAKE) fuzz-short

# Native tests under sanitizers: `make asan` builds and runs them all, `make fuzz N=10` runs ten million cases of
# the codecs' fuzzer (SEED=... for others), split over the CPUs; `make fuzz-onnx N=10` ten thousand damaged ONNX models.
N    ?= 1
SEED ?= 1
comma := ,
SANITIZED := cmake -S . -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DACTZIP_PYTHON=OFF -DACTZIP_NATIVE_TESTS=ON \
  -DACTZIP_SANITIZE=address,undefined $$(command -v ninja >/dev/null && echo -G Ninja) \
  $$(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache)

asan: ## native tests and a short round of the fuzzer under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZED) >/dev/null
	cmake --build build/asan
	ctest --test-dir build/asan --output-on-failure

tsan: ## concurrent runs of one plan under ThreadSanitizer
	$(subst build/asan,build/tsan,$(subst address$(comma)undefined,thread,$(SANITIZED))) >/dev/null
	cmake --build build/tsan --target plan_test
	build/tsan/tests/native/plan_test concurrent

NEON_CXX ?= aarch64-linux-gnu-g++
test-neon: ## native tests of kernels, plans and codecs for AArch64 under qemu (packages qemu-user, g++-aarch64-linux-gnu)
	cmake -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(NEON_CXX) \
	  -DCMAKE_EXE_LINKER_FLAGS=-static -DACTZIP_PYTHON=OFF -DACTZIP_NATIVE_TESTS=ON >/dev/null
	cmake --build build/neon --target kernels_test plan_test codec_fuzz
	qemu-aarch64 build/neon/tests/native/kernels_test
	qemu-aarch64 build/neon/tests/native/plan_test
	qemu-aarch64 build/neon/tests/native/codec_fuzz --cases 2000 --seed 1

fuzz-short: # a round of seconds
	$(SANITIZED) >/dev/null
	cmake --build build/asan --target codec_fuzz
	build/asan/tests/native/codec_fuzz --cases 30000 --seed $(SEED)

fuzz: ## N million fuzz cases of every codec, under the same sanitizers
	$(SANITIZED) >/dev/null
	cmake --build build/asan --target codec_fuzz
	jobs=$$(nproc); each=$$(( $(N) * 1000000 / jobs )); pids=; \
	for j in $$(seq $$jobs); do \
	  build/asan/tests/native/codec_fuzz --cases $$each --seed $$(( $(SEED) * 1000 + j )) & pids="$$pids $$!"; \
	done; \
	for p in $$pids; do wait $$p || exit 1; done

fuzz-onnx: ## N thousand damaged ONNX models, compiled and run with the native modules under the same sanitizers
	$(subst build/asan,build/asan-python,$(subst -DACTZIP_PYTHON=OFF -DACTZIP_NATIVE_TESTS=ON,-DPython_EXECUTABLE=$$(command -v python),$(SANITIZED))) >/dev/null
	cmake --build build/asan-python --target _engine _codec
	mkdir -p build/asan-python/site && cp -r src/actzip build/asan-python/site/ && rm -f build/asan-python/site/actzip/_native/*.so
	cp build/asan-python/csrc/bindings/*.so build/asan-python/site/actzip/_native/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/asan-python/site python tests/fuzz/onnx_models.py $$(( $(N) * 1000 )) $(SEED)

fuzz-interop: ## N thousand Zarr arrays beside Zstandard's, ONNX graphs beside ONNX Runtime, N hundred PyTorch modules and hybrid networks, thousand training steps
	python tests/fuzz/zarr_arrays.py --cases $$(( $(N) * 1000 )) --seed $(SEED)
	python tests/fuzz/onnx_graphs.py --cases $$(( $(N) * 1000 )) --seed $(SEED)
	python tests/fuzz/torch_modules.py --cases $$(( $(N) * 100 )) --seed $(SEED)
	python tests/fuzz/hybrids.py --cases $$(( $(N) * 100 )) --seed $(SEED)
	python tests/fuzz/training_steps.py --cases $$(( $(N) * 1000 )) --seed $(SEED)

native: ## developer build: the extension modules beside the sources, incremental (use with PYTHONPATH=src)
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$(command -v python) -DCMAKE_INSTALL_PREFIX=src \
	  $$(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) >/dev/null
	cmake --build build/dev
	cmake --install build/dev >/dev/null

wheel: setup ## a wheel for this Python and machine in dist/
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

# PATH holds the new environment alone: no compiler, no CMake. The tests are copied away from the sources.
WHEEL_TESTS ?= tests/test_import.py tests/test_cpu.py tests/codec tests/runtime tests/test_onnx_backend.py
test-wheel: wheel ## the newest wheel in an environment of its own without a compiler, and its tests
	rm -rf build/wheel-test && $(PYTHON) -m venv build/wheel-test/venv && mkdir build/wheel-test/project
	build/wheel-test/venv/bin/python -m pip install -q "$(TORCH)" "$(VISION)"
	cp -r tests pyproject.toml docs benchmarks build/wheel-test/project/
	cd build/wheel-test/project && export PATH="$(abspath build/wheel-test/venv/bin)" && \
	  python -m pip install -q --no-build-isolation --only-binary :all: "$$(python -c 'import glob, os; print(max(glob.glob("$(abspath dist)/*.whl"), key=os.path.getmtime))')[onnx]" "pytest>=8.0" "hypothesis>=6.100" && \
	  python -m pytest -q $(WHEEL_TESTS)

bench-engine: setup ## every table of the engine (hours are not needed, an idle machine is): docs/results/engine.md
	$(BIN)/python benchmarks/engine/suite.py

lint: setup ## ruff, clang-format, mypy, import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python .ci/wrap.py --check
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h')
	cp $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/actzip/_native/*.pyi src/actzip/_native/  # the native modules' stubs, which the build made
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/python .ci/wrap.py
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

docs: setup ## the documentation as a site, in site/
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install -q "mkdocs-material>=9.5"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build .venv out site dist
