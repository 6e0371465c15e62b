"""Mounting overlayfs, however many and however long the paths of its layers are.

Source: the kernel's ``Documentation/filesystems/overlayfs.rst`` and ``fs/overlayfs/params.c``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from snapfs.kernel import libc, mountapi, mounting
from snapfs.mountoptions import PAGE, escape


class MountApiLacking(Exception):
    """This kernel's mount API can't mount the overlay; mount(2) may."""


def mount_overlay(
    target: str | int,
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
    options: Sequence[str],
    *,
    read_only: bool,
    attributes: int = 0,
) -> None:
    """Mount an overlay at ``target``: a path, or a descriptor of a directory, O_PATH for one.

    ``lowers`` are its lower layers, the nearest first, up to 500; ``upper`` and ``work`` are given together or not at all,
    and without them the overlay is read-only anyway.  All paths are absolute, without ``.`` and ``..``, and may hold any
    bytes.  ``options`` are further options of overlayfs as mount(8) takes them: ``index=off``, ``userxattr``.  With
    ``read_only`` nothing can be written through ``target``; ``attributes`` are of MOUNT_ATTR_NOSUID, NODEV, NOEXEC.

    A single lower without an upper is EINVAL: overlayfs wants two layers, and a bind is what such a snapshot needs.

    Raises OSError, and nothing has been mounted: with overlayfs's own words where it has some, with the path of the layer
    that it refused, otherwise with ``target``; E2BIG on kernels before 6.8 (6.13 for layers whose path has over 255 bytes),
    where the options of mount(2) can't hold the layers.
    """
    try:
        tree = make_overlay(lowers, upper, work, options, read_only=read_only, attributes=attributes)
    except MountApiLacking:
        place = mounting.path_of(target)
        mount_overlay_classic(place, lowers, upper, work, options, read_only=read_only, attributes=attributes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or mounting.path_of(target)) from None
    else:
        mounting.attach(tree, target)


def mount_overlay_classic(
    target: str,
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
    options: Sequence[str],
    *,
    read_only: bool,
    attributes: int = 0,
) -> None:
    """``mount_overlay`` by mount(2), whose options have to fit a page: if need be, the paths of the lower layers are given
    relative to the directory that holds them all."""
    flags = attributes | (mounting.MS_RDONLY if read_only else 0)  # MS_NOSUID and its kin are the same bits
    words = _option_string(lowers, upper, work, options)
    if len(os.fsencode(words)) < PAGE or not lowers:
        mounting.mount("overlay", target, "overlay", flags, words)
        return
    directory = os.path.commonpath(lowers)
    words = _option_string([os.path.relpath(lower, directory) for lower in lowers], upper, work, options)

    def mount_from_there() -> None:
        libc.separate_thread()
        os.chdir(directory)
        mounting.mount("overlay", target, "overlay", flags, words)

    with ThreadPoolExecutor(1) as own_thread:
        own_thread.submit(mount_from_there).result()


def _option_string(lowers: Sequence[str], upper: str | None, work: str | None, options: Sequence[str]) -> str:
    words = [f"lowerdir={':'.join(map(escape, lowers))}"]
    words += [f"{key}={escape(path)}" for key, path in (("upperdir", upper), ("workdir", work)) if path is not None]
    return ",".join([*words, *options])


def make_overlay(
    lowers: Sequence[str],
    upper: str | None,
    work: str | None,
    options: Sequence[str],
    *,
    read_only: bool,
    attributes: int = 0,
) -> int:
    """Make such an overlay as ``mount_overlay`` mounts, attached nowhere yet; its descriptor.

    This uses the mount API, a call a layer.  Raises MountApiLacking where this kernel's can't, and OSError.
    """
    try:
        context = mountapi.fsopen("overlay")
    except OSError as error:
        if error.errno in mounting.NO_MOUNT_API:
            raise MountApiLacking from None
        raise
    try:
        if not mountapi.takes_value(context, "lowerdir+"):
            raise MountApiLacking
        for lower in lowers:
            _set_layer(context, "lowerdir+", lower, lower)
        for key, path in (("upperdir", upper), ("workdir", work)):
            if path is not None:
                _set_layer(context, key, path, escape(path))
        mountapi.set_string(context, "source", "overlay")  # the first column of /proc/mounts, as with mount(2)
        for option in options:
            key, equals, value = option.partition("=")
            if equals:
                mountapi.set_string(context, key, value)
            else:
                mountapi.set_flag(context, key)
        mountapi.create(context)
        return mountapi.fsmount(context, attributes | (mountapi.MOUNT_ATTR_RDONLY if read_only else 0))
    finally:
        os.close(context)


def _set_layer(context: int, key: str, path: str, text: str) -> None:
    """Set ``key`` to the directory ``path``, given as ``text`` (overlayfs undoes backslashes in some keys and not in others)
    or, where that is too long for the call, as an open file."""
    try:
        if len(os.fsencode(text)) <= mountapi.STRING_MAX:
            mountapi.set_string(context, key, text)
            return
        layer = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            mountapi.set_descriptor(context, key, layer)
        finally:
            os.close(layer)
    except OSError as error:
        if error.errno == errno.EINVAL and f"Bad value for '{key}'" in (error.strerror or ""):
            raise MountApiLacking from None  # overlayfs before 6.13 takes strings only
        raise OSError(error.errno, error.strerror, path) from None
