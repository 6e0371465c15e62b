# A session of an ordinary user, from a clone to a clean end: sh ordinary.sh CLONE, in that user's home directory.
#
# fresh.sh has it done by an account that it has made a moment before.
set -eux

git config --global --add safe.directory '*' # the clone is root's
git config --global maintenance.autoDetach false # or git is still in the workspace when it has ended
git clone --quiet "$1" snapfs
python3 -m venv v
CFLAGS=-g0 v/bin/pip install --quiet --disable-pip-version-check ${LOCKED:+--constraint snapfs/tests/constraints.txt} ./snapfs pytest pytest-xdist
PATH=$PWD/v/bin:$PATH
export GIT_AUTHOR_NAME=ann GIT_AUTHOR_EMAIL=ann@example.org GIT_COMMITTER_NAME=ann GIT_COMMITTER_EMAIL=ann@example.org

mkdir snap
snapfs serve --detach root snap
export SNAPFS="$PWD/snap"
mkdir snap/active/b
cp -a snapfs/. snap/active/b/rootfs/
diff -r snapfs snap/active/b/rootfs/
mv snap/active/b snap/committed/base
mkdir snap/committed/base/active/web
snapfs run web -- sh -ec 'git checkout -q -b mine; echo new > new; git add new; git commit -qm new; git status --short'
test "$(snapfs run web -- git log -1 --format=%s)" = new
grep -qx 'A /new' snap/active/web/changes
snapfs checkpoint web -m 'with new'
snapfs run --over snapfs web -- sh -ec 'git -C ~/snapfs rm -q new && rm README.md && git commit -qam less'
test ! -e snapfs/new
test ! -e snap/active/web/rootfs/README.md
snapfs rollback web
snapfs run web -- test -e new -a -e README.md

cp -r snapfs/examples/pytest tests
python3 -m venv small # of snapfs alone, as where nothing can be compiled
small/bin/pip install --quiet --disable-pip-version-check ${LOCKED:+--constraint snapfs/tests/constraints.txt} pytest pytest-xdist
small/bin/pip install --quiet --disable-pip-version-check --no-deps ./snapfs
small/bin/python -m pytest -q -p no:cacheprovider --basetemp tmp -n 2 tests
python -m pytest -p no:cacheprovider --basetemp tmp -n 2 tests >said || { cat said; exit 1; }
grep 'snapfs: copies are overlays' said # or the same tests would pass with whole copies

fusermount3 -u snap
while test -e snap/README; do sleep 0.1; done
