"""Id mappings: which user and group ids of a container are which of the host, as two labels of a snapshot say it; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from snapfs.errors import InvalidArgument

UID_MAPPING = "containerd.io/snapshot/uidmapping"
GID_MAPPING = "containerd.io/snapshot/gidmapping"
"""The labels: ``container:host:size``, several with commas.  containerd's names."""

Mapped = tuple[int, int, int]
"""One line of a mapping: first id in the container, first id on the host, how many."""


NO_ID = 2**32 - 1
"""The one number that is no id: chown(2) leaves the owner as it is."""


def mappings(labels: Mapping[str, str]) -> tuple[list[Mapped], list[Mapped]]:
    """The mappings of users and groups that ``labels`` say, empty where there is none; raises InvalidArgument."""
    uids, gids = (parse_mapping(labels[label], label) if labels.get(label) else [] for label in (UID_MAPPING, GID_MAPPING))
    return uids, gids


def parse_mapping(text: str, label: str) -> list[Mapped]:
    """``container:host:size`` with commas between several, as in the mapping labels; raises InvalidArgument."""
    lines = []
    for part in text.split(","):
        numbers = part.split(":")
        if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and int(n) < 2**32 for n in numbers):
            raise InvalidArgument(f'label {label}: "{part}" is not container:host:size with three numbers')
        container, host, size = map(int, numbers)
        if not size or max(container, host) + size > NO_ID:
            raise InvalidArgument(f'label {label}: "{part}" maps nothing, or beyond the last id, {NO_ID - 1}')
        lines.append((container, host, size))
    return lines


def to_host(container_id: int, mapping: Sequence[Mapped]) -> int | None:
    """The host's id for ``container_id``, None where ``mapping`` has none."""
    for container, host, size in mapping:
        if container <= container_id < container + size:
            return host + container_id - container
    return None


def remapped(host_id: int, before: Sequence[Mapped], after: Sequence[Mapped]) -> int:
    """The host's id to which ``after`` maps the container's id that ``before`` maps to ``host_id``.  An empty mapping maps each
    id to itself; ``host_id`` where either mapping has no counterpart."""
    inside = to_host(host_id, [(host, container, size) for container, host, size in before]) if before else host_id
    outside = None if inside is None else to_host(inside, after) if after else inside
    return host_id if outside is None else outside


def root_owner(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """The host's uid and gid of the container's ids 0 after the mapping labels; None where there are none.

    With only one of the two labels the other id is 0.  Raises InvalidArgument for a mapping that doesn't parse or has
    no entry for 0.
    """
    if not labels.get(UID_MAPPING) and not labels.get(GID_MAPPING):
        return None
    owner = []
    for label in (UID_MAPPING, GID_MAPPING):
        text = labels.get(label)
        host = to_host(0, parse_mapping(text, label)) if text else 0
        if host is None:
            raise InvalidArgument(f'label {label}: "{text}" maps no host id to the container id 0')
        owner.append(host)
    return owner[0], owner[1]
