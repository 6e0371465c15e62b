#!/bin/sh
# A whole life of snapshots, from a shell.  Run it as root after `make run` or `make test` has set things up:
#
#     sh examples/tour.sh
#
# It works in a temporary directory and leaves nothing behind.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
snapfs=${SNAPFS_COMMAND:-$here/.venv/bin/snapfs}
work=$(mktemp -d)

say() { printf '\n# %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; eval "$*"; }
refused() { printf '$ %s\n' "$*"; if eval "$*"; then echo "that should have been refused" >&2; exit 1; fi; }
expect() { test "$1" = "$2" || { echo "expected '$2', got '$1'" >&2; exit 1; }; }

finish() {
    status=$?
    cd /
    for target in base a b peek grand; do
        ! mountpoint -q "$work/$target" || umount "$work/$target"
    done
    kill "$daemon" 2>/dev/null && wait "$daemon" || :
    rm -rf "$work"
    exit $status
}
trap finish EXIT
trap 'exit 1' INT TERM

# --- start the daemon; it says on standard error when it is ready

mkdir "$work/snap" "$work/base" "$work/a" "$work/b" "$work/peek" "$work/grand"
mkfifo "$work/ready"
"$snapfs" serve "$work/root" "$work/snap" 2>"$work/ready" &
daemon=$!
head -n 1 "$work/ready"
cd "$work/snap"

# A program that mounts does it from mounts.json, which holds type, source and options of each mount:
mount_snapshot() {  # KEY TARGET
    python3 -c '
import json, subprocess, sys
for mount in json.load(open(sys.argv[1])):
    bind = ["-t", mount["type"]] if mount["type"] != "bind" else []
    subprocess.run(["mount", *bind, "-o", ",".join(mount["options"]), mount["source"], sys.argv[2]], check=True)
' "active/$1/mounts.json" "$2"
}

say "A base: mkdir prepares an active snapshot, its files go into diff/, mv commits it."
run "mkdir active/b"
run "mkdir active/b/diff/etc"
run "echo 'version 1' > active/b/diff/etc/release; echo 'old news' > active/b/diff/etc/motd"
run "mv active/b committed/base"
run "ls committed"

say "Two children on the same base, each with an overlay mount of its own."
run "mkdir committed/base/active/a committed/base/active/b"
run "ls -l committed/base/active"
run "cat active/a/mounts.json"
run "mount_snapshot a ../a; mount_snapshot b ../b"
run "echo 'only in a' > ../a/etc/a.conf"
run "echo 'version 2' > ../b/etc/release"
run "rm ../b/etc/motd"
expect "$(cat ../a/etc/release ../a/etc/a.conf)" "version 1
only in a"
expect "$(cat ../b/etc/release; ls ../b/etc)" "version 2
release"

say "The base did not change; b's own layer has the new file, and a whiteout for the deleted one."
run "cat committed/base/diff/etc/motd"
run "ls -l active/b/diff/etc"
test -c active/b/diff/etc/motd

say "A view is read-only."
run "mkdir committed/base/view/peek"
run "sh view/peek/mount.sh ../peek"
run "cat ../peek/etc/release"
refused "echo x > ../peek/etc/release"
run "umount ../peek"

say "Labels are files; info.json tells all."
run "echo blue > active/b/labels/team"
run "cat active/b/info.json"

say "A snapshot that is mounted can't be committed; unmount it, and mv does it."
refused "mv active/b committed/v2"
run "tail -n 1 .snapfs/error_log"
run "umount ../b ../a"
run "mv active/b committed/v2"
run "cat committed/v2/parent/info.json"

say "A grandchild sees all three layers as one."
run "mkdir committed/v2/active/grand"
run "sh active/grand/mount.sh ../grand"
run "cat ../grand/etc/release; ls ../grand/etc"
expect "$(cat ../grand/etc/release; ls ../grand/etc)" "version 2
release"
run "umount ../grand"

say "What each layer takes."
run "du -s committed/*"

say "Removal in the wrong order is refused, with the reason; in the right order it works."
refused "rmdir committed/base"
run "tail -n 1 .snapfs/error_log"
run "rmdir active/grand committed/v2 view/peek active/a committed/base"
run "ls active view committed by-id"
expect "$(ls active view committed by-id | grep -v ':$' | grep .)" ""

say "SIGTERM unmounts the tree and ends the daemon."
cd /
kill "$daemon"
wait "$daemon"
run "mountpoint $work/snap || echo gone"
