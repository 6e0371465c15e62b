"""snapfs's errors -> errno: the one table."""

from __future__ import annotations

import errno

from snapfs import errors

_ERRNO: tuple[tuple[type[errors.SnapshotError], int], ...] = (  # the first that fits
    (errors.NotFound, errno.ENOENT),
    (errors.AlreadyExists, errno.EEXIST),
    (errors.NotEmpty, errno.ENOTEMPTY),
    (errors.Busy, errno.EBUSY),
    (errors.TooDeep, errno.EMLINK),
    (errors.TooManyNames, errno.EMLINK),
    (errors.FailedPrecondition, errno.EPERM),
    (errors.NameTooLong, errno.ENAMETOOLONG),
    (errors.NotUtf8, errno.EILSEQ),
    (errors.LabelTooBig, errno.E2BIG),
    (errors.ImageTooBig, errno.EFBIG),
    (errors.WrongParent, errno.EPERM),
    (errors.InvalidArgument, errno.EINVAL),
    (errors.Damaged, errno.EIO),
)


def errno_of(error: errors.SnapshotError) -> int:
    """The errno that says best what ``error`` says in words."""
    if isinstance(error, errors.Unavailable):
        return error.errno or errno.EIO
    return next(number for kind, number in _ERRNO if isinstance(error, kind))
