# make run    mount a tree on /tmp/snapfs/snap (make run DEMO=/elsewhere: on /elsewhere/snap) and show what to type
# make test   run every test (as root; mounts for real, in mount namespaces of its own), two at a time: PYTEST_ARGS="-n 0 -x" one
# make quick  what needs no mount, as any user, in less than 20 s: QUICK="rooms names" is tests/test_rooms.py and tests/test_names.py
# make soak   64 clients do everything at once for ten minutes: make soak SOAK_ARGS="--clients 16 --seconds 60"
# make crash  kill the daemon between any two of its system calls, some thousand times, and see what is left
# make fresh  the first session and make test on a bare bookworm and trixie: SUITES=trixie PYTEST_ARGS=tests/test_cli.py does less
# make lint   check style and types
# make fuzz   feed names, filters, records and archives with whatever breaks them, SECONDS each (300)
# make bench  measure everything beside what it is to be measured with: BENCH_ARGS="--only prepare --rounds 3" measures less
# make systemd   boot a machine in namespaces, with systemd, and see that units, fstab and journal do as the README says
# make desktop  the tests with file managers and indexers, also those that take too many packages for make test
# make picture  make the README's first picture anew, from a tree, a file manager and a shell as they are
# make lock   pin the newest versions: with hashes for who deploys (examples/deploy), and those that LOCKED=1 installs (.ci/run)
# make newest   see whether what is newer than those, and a newcomer gets, does as well
# make powercut   cut the power of test disks some thousand times, and say what was lost
#
# Each installs what it needs first: Debian packages where missing (with sudo if not root), and Python packages into .venv.

PYTHON ?= python3
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

RUN_PACKAGES := fuse3 libfuse3-dev pkg-config gcc libc6-dev mount util-linux
TEST_PACKAGES := acl bsdutils btrfs-progs bubblewrap busybox-static containerd curl dash dbus docker-registry e2fsprogs ed fio fish git imagemagick l3afpad libarchive-tools libglib2.0-bin locales mc nodejs openbox pcmanfm perl-base plocate podman postgresql procps rsync runc skopeo systemd tar thunar tmux tracker tracker-extract tracker-miner-fs tree tumbler uidmap umoci vim xclip xdotool xfsprogs xvfb zsh
DESKTOP_PACKAGES := baloo-kf5 samba samba-vfs-modules smbclient zenity
PICTURE_PACKAGES := dbus imagemagick openbox pcmanfm tree util-linux xdotool xterm xvfb
FRESH_PACKAGES := debian-archive-keyring e2fsprogs git mmdebstrap util-linux

SUITES ?= bookworm trixie
FRESH_COMMAND ?= make test
export FRESH_COMMAND PYTEST_ARGS

# Tests of names, filters, records, the library and the tree's nodes; those of them that need a mount are left out
QUICK ?= rooms exports names filters mountspec model metastore rules snapshotter usage tree

# What serves a tree and containerd's socket, in a few seconds
SERVED := tests/test_readme.py tests/test_containerd_service.py

# Where lint and quick run
BIN ?= .venv/bin

# Not in the clone: pip, pytest, grep and git would walk through all that is mounted there
DEMO ?= /tmp/snapfs

SECONDS ?= 300
FUZZ_TARGETS := names filters records archives

compile = .venv/lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --system-certs --custom-compile-command 'make lock'

LOCK := $(if $(LOCKED),--constraint tests/constraints.txt)

.PHONY: run test quick fresh fresh-packages lint crash soak fuzz powercut systemd desktop picture bench lock newest clean

run: .venv/ready
	@mkdir -p -m 700 '$(DEMO)'
	@test -O '$(DEMO)' && test ! -L '$(DEMO)' || { echo "$(DEMO) is somebody else's; name another: make run DEMO=/tmp/mine"; exit 1; }
	@mkdir '$(DEMO)/snap' 2>/dev/null || :  # it may be there, and dead
	@echo
	@echo "The tree will be at $(DEMO)/snap until you press Ctrl-C here. In another shell:"
	@echo
	@echo "  cd $(DEMO)/snap && cat README"
	@echo "  mkdir active/b                       # prepare a snapshot"
	@echo "  cp /etc/hostname active/b/rootfs/    # its files"
	@echo "  mv active/b committed/base           # commit it"
	@echo "  mkdir committed/base/active/web      # another one on top"
	@echo "  cd active/web/rootfs                 # the two together, copy-on-write"
	@echo
	@exec .venv/bin/snapfs serve '$(DEMO)/root' '$(DEMO)/snap'

test: .venv/ready-for-tests
	$(SUDO) .venv/bin/python -m pytest -n 2 $(PYTEST_ARGS)

quick: .venv/ready-for-development
	TMPDIR=$(firstword $(wildcard /dev/shm) /tmp) $(BIN)/python -m pytest -q -m 'not mounts' -k 'not blocking-' \
	  -p no:cacheprovider --hypothesis-profile=quick -o tmp_path_retention_policy=failed \
	  $(QUICK:%=tests/test_%.py) $(PYTEST_ARGS)

soak: .venv/ready-for-tests
	$(SUDO) .venv/bin/python -m tests.soak --seconds 600 --clients 64 $(SOAK_ARGS)

powercut: .venv/ready-for-tests
	$(SUDO) env POWER_CUTS=$${POWER_CUTS:-500} .venv/bin/python -m pytest -q -s tests/test_power.py $(PYTEST_ARGS)

systemd: .venv/ready-for-tests
	$(SUDO) .venv/bin/python -m pytest -q tests/boot_systemd.py $(PYTEST_ARGS)

desktop: .venv/ready-for-tests
	@$(call install_packages,$(DESKTOP_PACKAGES))
	$(SUDO) .venv/bin/python -m pytest tests/test_desktop.py tests/baloo.py tests/earlier.py $(PYTEST_ARGS)

picture: .venv/ready
	@$(call install_packages,$(PICTURE_PACKAGES))
	$(SUDO) bash tests/picture.sh

bench: .venv/ready-for-tests
	$(SUDO) .venv/bin/python -m tests.bench $(BENCH_ARGS)

crash: .venv/ready-for-tests
	$(SUDO) .venv/bin/python -m tests.crash
	$(SUDO) env EVERY=1 .venv/bin/python -m pytest -q tests/test_apply.py tests/test_apply_ends.py tests/test_adopt.py tests/test_export.py tests/test_import.py \
	  tests/test_state_machine.py

lint: .venv/ready-for-development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock: .venv/lock/ready
	$(compile) --generate-hashes --extra containerd --output-file examples/deploy/requirements.txt pyproject.toml
	$(compile) --no-annotate --extra dev --constraint examples/deploy/requirements.txt \
	  --output-file tests/constraints.txt pyproject.toml

newest: .venv/ready-for-tests
	@$(PYTHON) -m venv --clear .venv/newest
	@.venv/newest/bin/pip install --quiet --disable-pip-version-check --upgrade pip
	@CFLAGS="-g0 $$CFLAGS" .venv/newest/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]' || \
	  { echo "THE NEWEST VERSIONS of what snapfs takes can't be installed" >&2; exit 1; }
	@changed=$$(.venv/newest/bin/pip freeze --all --exclude-editable --exclude pip | .venv/bin/python -m tests.newest) || exit; \
	test -n "$$changed" || { echo "the newest versions are those of tests/constraints.txt"; exit 0; }; \
	echo "newer than in tests/constraints.txt: $$changed"; \
	{ $(MAKE) BIN=.venv/newest/bin lint quick && $(SUDO) .venv/newest/bin/python -m pytest -q $(SERVED); } || \
	  { echo "THE NEWEST VERSIONS of what snapfs takes BREAK IT: $$changed" >&2; exit 1; }

fresh: fresh-packages
	@ended=0; for suite in $(SUITES); do \
	  $(SUDO) env PYTEST_ARGS="$$PYTEST_ARGS" bash tests/fresh.sh $$suite "$$FRESH_COMMAND" || ended=$$?; \
	done; exit $$ended

fresh-packages:
	-@$(call install_packages,$(FRESH_PACKAGES))

fuzz: .venv/ready-for-fuzzing
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p .fuzz/$$target && echo "$$target for $(SECONDS) s" && \
	  nice .venv/bin/python -m tests.fuzz_atheris $$target -max_total_time=$(SECONDS) -verbosity=0 -print_final_stats=1 \
	    -artifact_prefix=.fuzz/$$target- .fuzz/$$target || exit; \
	done

clean:
	rm -rf .fresh .fuzz .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/ready: pyproject.toml $(if $(LOCKED),tests/constraints.txt)
	@$(call install_packages,$(RUN_PACKAGES) $$($(call python_packages)))
	@$(call check_python)
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.2'  # its commands start faster
	CFLAGS="-g0 $$CFLAGS" .venv/bin/pip install --quiet --disable-pip-version-check $(LOCK) --editable .  # compiles pyfuse3
	@touch $@

.venv/ready-for-development: .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check $(LOCK) --editable '.[dev]'
	@touch $@

.venv/ready-for-tests: .venv/ready-for-development .venv/containerd/ready Makefile
	@$(call install_packages,$(TEST_PACKAGES))
	@touch $@

.venv/containerd/ready: tests/containerds.py | .venv/ready
	.venv/bin/python -m tests.containerds
	@touch $@

.venv/lock/ready: | .venv/ready
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/pip install --quiet --disable-pip-version-check uv
	@touch $@

.venv/ready-for-fuzzing: .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@touch $@

# $(call install_packages,PACKAGES): install those that dpkg doesn't have; elsewhere than on Debian, trust that they are there
define install_packages
command -v dpkg-query >/dev/null || exit 0; \
missing=; for package in $(1); do \
  dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || missing="$$missing $$package"; \
done; \
test -z "$$missing" || { echo "Installing$$missing"; \
  $(SUDO) apt-get -qq update && \
  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install $$missing >/dev/null; }
endef

# What Debian's Python lacks: venv, and the headers to compile pyfuse3
define python_packages
$(PYTHON) -c 'import ensurepip, os, sys, sysconfig; \
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null || \
  echo python3 python3-venv python3-dev
endef

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "snapfs needs Python 3.11 or later; name one: make PYTHON=python3.12"; exit 1; }
endef
