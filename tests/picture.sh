# The README's first picture: a small tree of snapshots at /snap, in a file manager and in a shell, as they are.
#
#     make picture     installs what it needs (dbus imagemagick openbox pcmanfm tree util-linux xdotool xterm xvfb), and writes
#                      examples/snap.png, as root
#
# The tree is mounted on /snap in a mount namespace of its own, the screen is an X server of its own; nothing of them stays.
set -eu

width=1000 height=460 manager_width=540

if test "${1-}" != --within; then
    cd "$(dirname "$0")/.."
    made=
    test -e /snap || { mkdir /snap && made=1; }
    status=0
    unshare --mount --propagation private bash tests/picture.sh --within || status=$?
    test -z "$made" || rmdir /snap
    exit $status
fi

clone=$PWD work=$(mktemp -d) pids=
export PATH="$clone/.venv/bin:$PATH" HOME="$work/home" XDG_RUNTIME_DIR="$work/run" LC_ALL=C.UTF-8
unset DBUS_SESSION_BUS_ADDRESS SNAPFS
mkdir -p "$HOME/.config/libfm" "$HOME/.config/pcmanfm/default" "$HOME/.config/openbox" "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"

end() {
    cd /
    for pid in $pids; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    until umount /snap 2>/dev/null || ! mountpoint -q /snap; do sleep 0.1; done
    flock /srv/snapfs/lock true || true # the daemon ends a moment after umount
    rm -rf "$work"
}
trap end EXIT

start() { # a group of its own, to be ended as one
    setsid "$@" >>"$work/log" 2>&1 &
    pids="$! $pids"
}

# -- the snapshots: a base, what is installed on it, an application on that, and a look at it

mount -t tmpfs -o mode=755 tmpfs /srv
snapfs serve --detach /srv/snapfs /snap
cd /snap
layer() { # NAME PARENT FILE
    mkdir "$2/active/new"
    mkdir -p "active/new/rootfs/${3%/*}"
    echo "$1" >"active/new/rootfs/$3"
    mv active/new "committed/$1"
}
layer base . etc/os-release
layer deps committed/base lib/libshop.so
layer app-1.0 committed/deps app/shop.py
mkdir committed/app-1.0/view/look

# -- the screen: a window each, side by side

cat >"$HOME/.config/openbox/rc.xml" <<'END_OF_FILE'
<openbox_config xmlns="http://openbox.org/3.4/rc">
<theme><name>Clearlooks</name><titleLayout>L</titleLayout></theme>
</openbox_config>
END_OF_FILE
printf '[ui]\nbig_icon_size=40\nshow_thumbnail=0\n' >"$HOME/.config/libfm/libfm.conf"
cat >"$HOME/.config/pcmanfm/default/pcmanfm.conf" <<END_OF_FILE
[ui]
win_width=$manager_width
win_height=$((height - 22))
splitter_pos=215
side_pane_mode=dirtree
view_mode=icon
toolbar=navigation;
show_statusbar=0
END_OF_FILE
echo 'gtk-font-name = "DejaVu Sans 9"' >"$HOME/.gtkrc-2.0"
mkfifo "$work/display"
exec 3<>"$work/display"
start Xvfb -displayfd 3 -screen 0 "${width}x${height}x24" -nolisten tcp -noreset -r
read -r -t 30 -u 3 number
export DISPLAY=":$number"
start openbox
window() { xdotool search --sync --onlyvisible --name "^$1\$" | head -n 1; }
until xdotool get_num_desktops; do sleep 0.1; done >/dev/null 2>&1 # openbox is there

# -- the shell

start env PS1='\w# ' PROMPT_COMMAND="echo >>'$work/prompts'" xterm -T shell -fa 'DejaVu Sans Mono' -fs 9.5 \
    -bg white -fg black -b 4 -e bash --norc
shell=$(window shell)
xdotool windowmove --sync "$shell" $manager_width 0 windowsize --sync "$shell" $((width - manager_width)) $((height - 22))
xdotool windowfocus --sync "$shell"
prompts=0
touch "$work/prompts"
type_line() { # type it when there is a prompt
    until test "$(wc -l <"$work/prompts")" -gt $prompts; do sleep 0.05; done
    prompts=$(wc -l <"$work/prompts")
    xdotool type --delay 5 "$1"
}
enter() {
    type_line "$1"
    xdotool key Return
}
enter "clear"
enter "mkdir committed/app-1.0/active/work   # prepare"
enter "echo 'new!' > active/work/rootfs/app/shop.py"
enter "cat active/work/changes"
enter "tree -L 1 --noreport active committed view"
enter "ls committed/base/committed"
enter "snapfs tree"
type_line "mv active/work committed/app-2.0      # commit"

# -- the file manager, its side pane scrolled to /snap

start dbus-run-session -- pcmanfm --no-desktop /snap/committed/base/committed/deps
manager=$(window deps)
xdotool windowmove --sync "$manager" 0 0
picture() { import -window root -depth 8 rgb:-; }
settled() { # nothing has moved for a second
    local before=''
    until test "$before" = "$(picture | md5sum)"; do before=$(picture | md5sum) && sleep 1; done
}
settled
xdotool mousemove 60 300 click --repeat 3 --delay 50 4 mousemove $((width - 1)) $((height - 1))
settled
import -window root +dither -colors 64 -depth 8 "$clone/examples/snap.png"
