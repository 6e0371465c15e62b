#!/bin/sh
# A build in layers: each step is a snapshot on the one before, and a step that was done before is not done again.
#
# After `make run` has mounted a tree on /tmp/snapfs/snap, as root, with one step a line (empty lines and # comments are skipped):
#
#     cat > steps <<'END'
#     mkdir src && echo 'hello from the first step' > src/hello
#     tr a-z A-Z < src/hello > shouted
#     tar -cf release.tar src shouted
#     END
#     sh examples/layered_build.sh /tmp/snapfs/snap < steps
#
# Run it twice, change the last line, run it again, then the line before, and look at which steps say "ran" and which "reused".
# Each command runs in the merged file system of all steps so far; it is not confined (workspace.sh shows how to).
#
# A snapshot's name is a hash of its command and of the name it stands on, so whatever has that name is what the command would
# make, whoever made it and whenever; changing a step changes all names after it.  The cache is the tree itself:
#
#     du -sh /tmp/snapfs/snap/committed/*                # what each layer takes
#     cat /tmp/snapfs/snap/committed/HASH/changes        # what a step did
#     cat /tmp/snapfs/snap/committed/HASH/labels/step    # which step it was
#     ls /tmp/snapfs/snap/committed/HASH/rootfs          # the whole result, read-only
set -eu

test $# -eq 1 || { echo "usage: $0 TREE < STEPS" >&2; exit 2; }
test -d "$1/.snapfs" || { echo "$0: no snapfs tree is mounted on $1; \`make run\` mounts one on /tmp/snapfs/snap" >&2; exit 1; }
cd "$1"

building=build-$$
trap '! test -d "active/$building" || rmdir "active/$building"' EXIT
trap 'exit 1' HUP INT TERM

base=.  # where the next step's snapshot is made: the tree's root, or the directory of the step before
while IFS= read -r command || test -n "$command"; do
    case $command in '' | '#'*) continue ;; esac
    hash=$(printf '%s\n%s' "$base" "$command" | sha256sum | cut -c 1-16)
    if test -d "committed/$hash"; then
        echo "reused $hash: $command"
    else
        mkdir "$base/active/$building"
        test -d "active/$building/rootfs" || { echo "$0: no rootfs here; $PWD/.snapfs/options.json says why" >&2; exit 1; }
        printf '%s\n' "$command" > "active/$building/labels/step"
        (cd "active/$building/rootfs" && exec sh -euc "$command" </dev/null) ||
            { echo "failed $hash: $command" >&2; exit 1; }
        if ! mv "active/$building" "committed/$hash"; then  # a build beside this one may have been faster, which is as good
            test -d "committed/$hash" || { tail -n 1 .snapfs/error_log >&2; exit 1; }
            rmdir "active/$building"
        fi
        echo "ran    $hash: $command"
    fi
    base=committed/$hash
done
test "$base" = . || echo "result $PWD/$base/rootfs"
