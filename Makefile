# make demo | test | test-pythons | lint | bench | bench-monorepo | fuzz | setup | clean.
# PYTHON chooses the interpreter, 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HELLO := examples/hello

# What must be there, a program or a file, and the Debian package that brings it.
DEMO_TOOLS := skopeo:skopeo mke2fs:e2fsprogs /var/lib/dpkg/info/busybox-static.list:busybox-static \
	qemu-system-x86_64:qemu-system-x86
TEST_TOOLS := $(DEMO_TOOLS) umoci:umoci buildah:buildah mmdebstrap:mmdebstrap docker-registry:docker-registry \
	dockerd:docker.io setpriv:util-linux zstd:zstd openssl:openssl faketime:faketime mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs \
	qemu-img:qemu-utils veritysetup:cryptsetup-bin newuidmap:uidmap \
	tar2sqfs:squashfs-tools-ng sqfstar:squashfs-tools mkfs.erofs:erofs-utils \
	/usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring

# Where `fledge boot` looks for the kernel that it boots; `make kernel` unpacks Debian's there and installs nothing.
KERNEL_DIR := $(or $(FLEDGE_KERNEL_DIR),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fledge-tasks/kernel)

# Each Python of pyenv and of the PATH from 3.11 on, and the tests that depend on it; PYTHONS chooses others.
PYENV_ROOT ?= $(HOME)/.pyenv
VERSIONS := 3.11 3.12 3.13 3.14
PYTHONS ?= $(foreach version,$(VERSIONS),$(or $(lastword $(wildcard $(PYENV_ROOT)/versions/$(version).*/bin/python3)), \
	$(shell PATH="$(subst $(PYENV_ROOT)/shims,,$(PATH))" command -v python$(version))))
PYTHONS_TESTS ?= -n auto --ignore tests/real tests

# Everything in test and bench that mounts an image or starts a daemon needs root.
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),$(shell command -v sudo))

.PHONY: demo test test-pythons lint bench bench-monorepo fuzz setup kernel clean venv demo-tools test-tools python
.DEFAULT_GOAL := demo

demo: venv demo-tools kernel $(HELLO)/layouts/hello
	$(BIN)/fledge -C $(HELLO) build
	$(BIN)/fledge -C $(HELLO) build
	@PATH="$$PATH:/usr/sbin:/sbin" e2fsck -fn $(HELLO)/build/hello/rootfs.img
	@wc -c $(HELLO)/build/hello/rootfs.img
	FLEDGE_KERNEL_DIR="$(KERNEL_DIR)" $(BIN)/fledge -C $(HELLO) boot hello --show
	@echo "Now change $(HELLO)/motd, a mapped file, and run make demo again."

test: venv test-tools kernel
# First what shares images, a registry and daemons, file by file; then all others, test by test.
	$(AS_ROOT) env FLEDGE_REQUIRE_TOOLS=1 FLEDGE_KERNEL_DIR="$(KERNEL_DIR)" \
		$(BIN)/python -m pytest -n auto --dist loadfile tests/real
	$(AS_ROOT) env FLEDGE_REQUIRE_TOOLS=1 $(BIN)/python -m pytest -n auto --ignore tests/real

test-pythons: test-tools
	@failed=; for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1; \
		echo "== Python $$version: $$python"; \
		test .venv-$$version/.stamp -nt pyproject.toml || { $$python -m venv .venv-$$version && \
			.venv-$$version/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' && \
			touch .venv-$$version/.stamp; } && \
		env FLEDGE_REQUIRE_TOOLS=1 .venv-$$version/bin/python -m pytest $(PYTHONS_TESTS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "error: failed with Python$$failed" >&2; exit 1; }

lint: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: venv test-tools
	$(AS_ROOT) $(BIN)/python -m bench.run

bench-monorepo: venv test-tools
	$(AS_ROOT) $(BIN)/python -m bench.monorepo --write

# Seconds for each target. atheris has wheels for few interpreters, so it is no dependency of the tests.
FUZZ_SECONDS ?= 60
fuzz: venv
	$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python -m fuzz layer -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m fuzz manifest -max_total_time=$(FUZZ_SECONDS)

setup: venv test-tools kernel

venv: python $(VENV)/.stamp

kernel:
	@ls "$(KERNEL_DIR)"/boot/vmlinuz-*-cloud-amd64 >/dev/null 2>&1 || $(fetch_kernel)

clean:
	rm -rf $(VENV) .venv-* build .fuzz .real-cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	rm -rf $(addprefix examples/*/,build cache layouts fledge.lock)
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.stamp: pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(HELLO)/layouts/hello: $(HELLO)/make-image.sh examples/oci-layout.sh | demo-tools
	$(HELLO)/make-image.sh

# $(call install,WHAT:PACKAGE...): install the packages of what is missing, or say which they are and stop.
define install
@PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
for need in $(1); do \
	case $$need in \
	/*) test -e "$${need%:*}" ;; \
	*) command -v "$${need%:*}" >/dev/null ;; \
	esac || missing="$$missing $${need##*:}"; \
done; \
test -n "$$missing" || exit 0; \
if test "$$(id -u)" = 0; then root=; \
elif command -v sudo >/dev/null; then root=sudo; \
else root=none; fi; \
if test "$$root" != none && command -v apt-get >/dev/null; then \
	echo "installing:$$missing"; \
	$$root apt-get -qq update && \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing && exit 0; \
fi; \
echo "error: these Debian packages are missing:$$missing" >&2; \
echo "  as root: apt-get install$$missing" >&2; \
exit 1
endef

# Without the package's scripts, which would put the kernel into the boot menu. Whoever cannot have it has all the rest.
define fetch_kernel
{ \
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT; \
	if test "$$(id -u)" = 0; then root=; else root=$$(command -v sudo) || root=false; fi; \
	fetch() { \
		package=$$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p') && test -n "$$package" && \
		(cd "$$scratch" && apt-get -qq -o APT::Sandbox::User=root download "$$package"); \
	}; \
	echo "fetching a kernel for fledge boot to $(KERNEL_DIR)"; \
	{ fetch 2>/dev/null || { $$root apt-get -qq update && fetch; }; } && \
	dpkg-deb -x "$$scratch"/*.deb "$$scratch/root" && chmod 0755 "$$scratch/root" && \
	mkdir -p "$(KERNEL_DIR)" && rm -rf "$(KERNEL_DIR).new" && cp -r "$$scratch/root" "$(KERNEL_DIR).new" && \
	mv -T "$(KERNEL_DIR).new" "$(KERNEL_DIR)" || \
	echo "note: Debian's linux-image-cloud-amd64 cannot be had: fledge boot will need --kernel" >&2; \
}
endef

demo-tools:
	$(call install,$(DEMO_TOOLS))

test-tools:
	$(call install,$(TEST_TOOLS))

python:
	$(if $(wildcard $(VENV)/.stamp),,$(call install,$(PYTHON):python3))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $$($(PYTHON) --version) is too old, 3.11 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory venv-package

.PHONY: venv-package
venv-package:
	$(call install,/nothing:python3-venv)
