# Start, kill and stop both units of examples/systemd, as they are, with a systemd of its own.  In pid and mount namespaces that
# end with it: its user manager, whose runtime directory is /run, takes the part of the system's.
# sh systemd.sh UNITS
set -eu
here=$PWD
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
mount -t tmpfs none /srv
test -e "$here/tests" || { mkdir -p "$here" && mount --no-canonicalize --bind . "$here"; } # it was in one of these
mkdir -p /run/systemd/system /run/config/systemd/user /srv/images
cp "$1"/*.service /run/config/systemd/user
export XDG_RUNTIME_DIR=/run XDG_CONFIG_HOME=/run/config SYSTEMD_LOG_TARGET=console
/lib/systemd/systemd --user &
until test -S /run/systemd/private; do kill -0 $!; sleep 0.05; done
ctl() { systemctl --user "$@"; }

ctl start snapfs snapfs@srv-images
mkdir /run/snapfs/active/a /run/snapfs-srv-images/active/b
ctl show --property StatusText --value snapfs

kill -KILL "$(ctl show --property MainPID --value snapfs)"
until ctl show --property NRestarts snapfs | grep -qx NRestarts=1 && ctl is-active --quiet snapfs; do sleep 0.05; done
ls /run/snapfs/active

ctl stop snapfs snapfs@srv-images
ctl show --property Result --value snapfs snapfs@srv-images
grep -v " $here " /proc/mounts | grep snapfs || echo unmounted
ls -d /run/snapfs
ctl exit
wait $!
