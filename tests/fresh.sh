# Be a newcomer: a bare Debian with a disk of its own, in it an ordinary clone, in that the README's first session, then COMMAND.
# bash fresh.sh SUITE COMMAND
#
# `make fresh` runs it.  The system is what mmdebstrap makes, with git and make and what every installed Debian has; all else is
# installed in it by this project's Makefile, from where this machine's apt and pip install too.  It stands in namespaces of its
# own (mount, pid, uts, ipc), which nothing outlives.  Ends with 75 where no such system can be made, else as COMMAND does.
set -euo pipefail
umask 022
git=(git -c 'safe.directory=*') # the clone may be another user's

step() { printf '\n== %s, %d s: %s\n' "$suite" "$SECONDS" "$*"; }
cannot() { printf 'make fresh: no bare system: %s\n' "$*" >&2; exit 75; }

# What this machine's apt is told about the way to the archive, and the archive that it uses, for another suite; sid has no updates
apt_options() { apt-config dump | grep -E '^Acquire::(http|https|Check-Valid-Until|Check-Date|Retries|ForceIPv[46])(::| )' || true; }
apt_sources() {
    local host
    host=$(. /etc/os-release; echo "${VERSION_CODENAME:-}")
    apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT) # $(ORIGIN)' 'Created-By: Packages' |
        sed -nE "s/^(deb [^ ]+) ${host:-none}((-updates|-security)? [^ ]+) # Debian\$/\1 $suite\2/p" |
        sed '/ sid-/d' | sort -u
}

# What this machine's pip is told about the way to the index, as variables; folders of this machine are not on that way
pip_variables() {
    { python3 -m pip config list 2>/dev/null || true; } | tr -d "'" | sed -n \
        's/^[a-z:]*\.\(index-url\|extra-index-url\|trusted-host\|proxy\|cert\|default-timeout\|timeout\)=/\1 /p' |
        while read -r name value; do
            value=$(printf '%b\n' "$value" | tr ' ' '\n' | sed '/^file:/d; /^$/d' | paste -sd ' ')
            test -z "$value" || printf 'PIP_%s=%s\n' "$(echo "$name" | tr a-z- A-Z_)" "$value"
        done
}

make_system() {
    local made=1
    mount -t tmpfs none /mnt && mkdir "$root" || return
    truncate -s 16G "$image" && mkfs.ext4 -q -F "$image" && mount -o loop "$image" "$root" && made=0
    rm "$image" # from here on it is gone with the mount
    test $made = 0 && apt_options >/mnt/options && apt_sources >/mnt/sources || return
    if test -s /mnt/sources; then set -- -; else set --; fi # none: mmdebstrap knows Debian's own
    mmdebstrap --variant=minbase --include=ca-certificates,git,make --aptopt=/mnt/options "$suite" "$root" "$@" </mnt/sources
}

# What an installer does, and the machine
finish_system() {
    ln -sfn ../proc/self/mounts "$root/etc/mtab"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    echo fresh >"$root/etc/hostname"
    printf '127.0.0.1\tlocalhost\n127.0.1.1\tfresh\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
    hostname fresh
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
    chroot "$root" update-ca-certificates >/dev/null 2>&1
    case $cert in /*) mkdir -p "$root${cert%/*}" && cp -L "$cert" "$root$cert" ;; esac
    printf '[safe]\n\tdirectory = *\n' >/mnt/gitconfig
    GIT_CONFIG_GLOBAL=/mnt/gitconfig git clone --quiet "$repository" "$root$clone"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --bind /dev "$root/dev"
    mount -t devpts -o nosuid,noexec,newinstance,gid=5,mode=620,ptmxmode=666 devpts "$root/dev/pts"
    mount -t tmpfs -o nosuid,nodev tmpfs "$root/dev/shm"
    mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs "$root/run"
    mount -t tmpfs -o nosuid,nodev,size=50%,nr_inodes=1m tmpfs "$root/tmp" # as in Debian 13
    mkdir "$root/run/lock"
    cd "$root"
    pivot_root . mnt
    umount -l /mnt
    cd "$clone"
}

# `make run`, what the README then says to type, Ctrl-C
first_session() {
    local server tree
    sed -n '/^and in another shell:/,/^`make test`/s/^    //p' README.md >/tmp/session
    tree=$(sed -n 's/^cd //p' /tmp/session)
    test -n "$tree"
    "${clean[@]}" setsid env --default-signal=INT make run >/tmp/run.log 2>&1 &
    server=$!
    until test -e "$tree/README"; do
        kill -0 $server 2>/dev/null && test $SECONDS -lt 900 || { cat /tmp/run.log; return 1; }
        sleep 0.1
    done
    "${clean[@]}" sh -eux /tmp/session
    cmp "$tree/committed/base/active/web/rootfs/hostname" /etc/hostname
    kill -INT -- -$server
    wait $server || true
    if grep -e fuse.snapfs -e overlay /proc/mounts; then cat /tmp/run.log; return 1; fi
    rm /tmp/run.log /tmp/session
}

# The same without root: an account, made a moment before, that clones, installs, works and leaves nothing
ordinary_session() {
    local as=(setpriv --reuid ann --regid ann --init-groups --inh-caps=-all env -i HOME=/home/ann USER=ann LOGNAME=ann LANG=C.UTF-8
        PATH=/usr/local/bin:/usr/bin:/bin "${passed[@]}")
    useradd --create-home ann
    mknod -m 666 /fuse c 10 229 # as udev makes it
    mount --bind /fuse /dev/fuse
    (cd /home/ann && "${as[@]}" sh "$clone/tests/ordinary.sh" "$clone")
    if grep -e fuse.snapfs -e overlay /proc/mounts; then return 1; fi
    while ends=$(find /proc -mindepth 1 -maxdepth 1 -user ann 2>/dev/null) && test -n "$ends"; do
        test $SECONDS -lt 900 || { echo "still running: $ends"; return 1; }
        sleep 0.1
    done
    test -z "$(find /tmp /var/tmp /dev/shm -user ann)" || { find /tmp /var/tmp /dev/shm -user ann; return 1; }
    umount /dev/fuse
    rm /fuse
    userdel --remove ann 2>/dev/null
    test ! -e /home/ann
}

newcomer() {
    step "a bare system"
    make_system || cannot "mmdebstrap could not make $suite (see above: the network, the name of the suite, a loop device?)"
    step "a clone of $("${git[@]}" -C "$repository" log -1 --format='%h, "%s"')"
    finish_system
    step "make run, and the first session of the README"
    first_session
    step "an ordinary user's session"
    ordinary_session
    step "$command"
    "${clean[@]}" sh -c "$command"
    step "it is as it should be"
}

outside() {
    suite=$1 child='' image=''
    for signal in HUP INT TERM; do trap "interrupted $signal" $signal; done
    test "$(id -u)" = 0 || cannot "it mounts and makes namespaces, so it runs as root"
    for program in apt-config git hostname mkfs.ext4 mmdebstrap unshare; do
        command -v $program >/dev/null || cannot "no $program here (on Debian: apt-get install mmdebstrap e2fsprogs git)"
    done
    unshare --mount --pid --fork --uts --ipc true || cannot "there are no namespaces to be had here"
    cd "$(dirname "$0")/.."
    "${git[@]}" rev-parse --quiet --verify HEAD >/dev/null || cannot "$PWD is not a git clone"
    test -z "$("${git[@]}" status --porcelain)" || echo "make fresh: it takes the last commit; what is not committed is not in it"
    mkdir -p .fresh
    image=$(mktemp /var/tmp/snapfs-fresh.XXXXXX)
    setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --uts --ipc \
        bash tests/fresh.sh --within "$PWD" "$image" "$@" <&0 3>".fresh/$suite.log" &
    child=$!
    wait $child
}

interrupted() {
    test -z "$child" || { kill -KILL "$child" && wait "$child"; } 2>/dev/null || true
    rm -f "$image"
    trap - "$1"
    kill -"$1" $$ # its caller is to see that, too
}

within() {
    repository=$1 image=$2 suite=$3 command=$4 root=/mnt/root clone=/srv/snapfs
    mapfile -t passed < <(
        pip_variables | sort -s -u -t= -k1,1
        env | grep -E '^(CI|LOCKED|PYTEST_ARGS|(http|https|no|HTTP|HTTPS|NO)_(proxy|PROXY))='
    )
    cert=$(printf '%s\n' "${passed[@]}" | sed -n 's/^PIP_CERT=//p')
    clean=(env -i HOME=/root USER=root LOGNAME=root SHELL=/bin/bash LANG=C.UTF-8 TERM="${TERM:-dumb}"
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${passed[@]}")
    mount -t proc proc /proc
    set +e
    { set -e; newcomer; } 2>&1 | tee /dev/fd/3
    status=${PIPESTATUS[0]}
    case $status in
    0 | 75) ;;
    *) echo "make fresh: $suite is not as it should be ($status); all of this is in .fresh/$suite.log" >&2 ;;
    esac
    exit "$status"
}

case $1 in
--within) within "${@:2}" ;;
--tied) outside "${@:2}" ;;
*) exec setpriv --pdeathsig TERM bash "$0" --tied "$@" ;; # so that it ends with its caller, whatever ends that
esac
