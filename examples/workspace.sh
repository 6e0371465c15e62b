#!/bin/sh
# A workspace for a script that nobody trusts (a stranger's, or a language model's): it is checkpointed, rolled back after
# damage, reviewed and accepted.
#
# After `make run` has mounted a tree on /tmp/snapfs/snap, as root (it needs busybox, unshare and chroot):
#
#     sh examples/workspace.sh /tmp/snapfs/snap
#
# With the path of a script as a second argument, that one does the last piece of work before the review.
#
# Look at the six functions: a few lines each, and that is all there is to it.  What it leaves for you to look at it
# names at the end, with the command that removes it.
#
# The script runs as nobody, without privileges, network or sight of other processes and files.  It can still fill the disk and
# keep the CPUs busy; a cgroup and a quota are the tools against that.
set -eu

test $# -eq 1 || test $# -eq 2 || { echo "usage: $0 TREE [SCRIPT]" >&2; exit 2; }
test -d "$1/.snapfs" || { echo "$0: no snapfs tree is mounted on $1; \`make run\` mounts one on /tmp/snapfs/snap" >&2; exit 1; }
busybox=$(command -v busybox) || { echo "$0: busybox is missing (Debian: apt-get install busybox-static)" >&2; exit 1; }
script=${2:+$(realpath "$2")}
cd "$1"

w=workspace-$$  # this run's snapshots begin with it
nobody=65534
made=           # the committed ones, the newest first
unreviewed=     # those since the base, the oldest first

on_failure() {
    status=$?
    if test $status -ne 0; then
        echo "$0 stopped; if the tree refused something, the last line of $PWD/.snapfs/error_log says why" >&2
        rmdir "active/$w" $made 2>/dev/null || :
    fi
    exit $status
}
trap on_failure EXIT
trap 'exit 1' HUP INT TERM

# Run the script on standard input inside the workspace.  With its pid namespace ends whatever it left in the background,
# so that nothing of it is in the workspace's way afterwards.  Its minute is up whatever it does: timeout is that namespace's
# first process, and root's (unshare itself blocks SIGTERM).  It has no terminal, and what it says is shown as its own, on lines
# that begin with a bar: it can neither clear the screen nor pass for the review.
untrusted() {
    { status=$( { { confined 2>&1 3>&- 4>&- && echo 0 >&3 || echo $? >&3; } | cat -v | sed 's/^/    | /' >&4; } 3>&1 ); } 4>&1
    return "$status"
}

confined() {
    unshare --pid --net --ipc --uts --fork --kill-child timeout --foreground -s KILL 60 \
        chroot --userspec=$nobody:$nobody "active/$w/rootfs" /bin/sh -c 'cd /project && exec /bin/sh -s'
}

checkpoint() {  # NAME
    mv "active/$w" "committed/$w-$1"
    mkdir "committed/$w-$1/active/$w"
    last=$w-$1
    made="committed/$last $made"
    unreviewed="$unreviewed committed/$last"
}

rollback() {
    rmdir "active/$w"
    mkdir "committed/$last/active/$w"
}

review() {  # all that changed since the base, one checkpoint after the other
    for layer in $unreviewed "active/$w"; do
        echo "$layer:"
        sed 's/^/    /' "$layer/changes"
    done
}

accept() {
    mv "active/$w" "committed/$w-accepted"
    made="committed/$w-accepted $made"
}

say() { printf '\n# %s\n' "$*"; }

say "The base: a shell that is root's, and a project that is nobody's."
mkdir "active/$w"
test -d "active/$w/rootfs" || { echo "$0: no rootfs here; $PWD/.snapfs/options.json says why" >&2; exit 1; }
(
    cd "active/$w/rootfs"
    mkdir bin project
    cp "$busybox" bin/busybox
    for tool in sh cat echo ls rm sed sleep test; do ln -s busybox bin/$tool; done
    echo 'a fine project' > project/README
    echo 'echo 6 times 7 is 41' > project/answer.sh
    chown -R $nobody:$nobody project
    chroot . bin/sh -c : || { echo "$0: $busybox does not run on its own: install busybox-static" >&2; exit 1; }
)
checkpoint base
unreviewed=  # that one is ours

say "Some good work, and a checkpoint."
untrusted <<'END'
    echo 'echo 6 times 7 is 42' > answer.sh
    sleep 1000 &
END
untrusted <<'END'
    sh answer.sh
END
checkpoint 1

say "Then it goes wrong: what is nobody's is lost, what is root's is not, and nothing else is to be seen."
untrusted <<'END' || :
    rm -rf /project/* /bin/sh
    echo 'all your files are mine' > README
    ls -R /project /bin /etc
END

# Judged from within, too: out here, a link that it made would lead wherever it likes.
if untrusted <<'END'
    test "$(sh answer.sh)" = '6 times 7 is 42'
END
then echo "That should have been noticed." >&2; exit 1
else say "The answer is gone: roll back."; rollback
fi

say "On it goes, where it was."
if test -n "$script"; then untrusted < "$script" || :
else untrusted <<'END'
    sh answer.sh
    echo 'a fine project, with an answer' > README
    echo 'echo 6 times 9 is 42' > question.sh
END
fi

say "For review, all that changed:"
review

say "Accepted."
accept
echo "The result:    ls -l '$PWD/committed/$w-accepted/rootfs/project'"
echo "To remove it:  cd '$PWD' && rmdir" $made
