#!/bin/sh
# Build an image in three steps, a layer each, on one that is there; and export it.
#
#     sh examples/images/build.sh IMAGE DEST       as in: … docker.io/library/alpine:3.20 oci-archive:app.tar:test.local/app:1
#
# IMAGE is a name in images/ (snapfs import docker://docker.io/library/alpine:3.20 docker.io/library/alpine:3.20 makes one), and
# the tree is the one that snapfs finds.  The steps run in the workspace as in a chroot, with what is in the image.
set -eu

test $# -eq 2 || { echo "usage: $0 IMAGE DEST" >&2; exit 2; }
w=build-$$
trap 'status=$?; snapfs rm -f "$w" 2>/dev/null || :; exit $status' EXIT
trap 'exit 1' HUP INT TERM

snapfs prepare "$w" --parent "images/$1" >/dev/null

# What follows is a step: it runs in the workspace, and becomes a layer, with the command in the image's history
step() {
    snapfs run "$w" -- chroot . /bin/sh -c "$1"
    top=$(snapfs checkpoint "$w" -m "$1")
}

step 'mkdir -p /app && echo "echo built by snapfs" > /app/run'
step 'chmod 755 /app/run'
step 'rm -rf /tmp/* /var/cache/*'

snapfs export "$top" "$2"
