"""Snapshots as plain values: times."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from snapfs.model import Info, Kind, rfc3339

DAY = 86_400 * 10**9


def info(created: int, updated: int) -> Info:
    return Info(name="web", kind=Kind.ACTIVE, id=1, parent=None, labels={}, created=created, updated=updated)


@pytest.mark.parametrize(
    ("ns", "expected"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (999, datetime(1970, 1, 1, tzinfo=UTC)),
        (1_000, datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (1_764_025_718_000_000_999, datetime(2025, 11, 24, 23, 8, 38, tzinfo=UTC)),
        (1_764_025_718_999_999_999, datetime(2025, 11, 24, 23, 8, 38, 999_999, tzinfo=UTC)),
        ((1 << 63) - 1, datetime(2262, 4, 11, 23, 47, 16, 854_775, tzinfo=UTC)),
    ],
)
def test_times_as_datetimes(ns: int, expected: datetime) -> None:
    """Aware, in UTC, and never later than the nanoseconds say."""
    assert info(ns, 0).created_at == info(0, ns).updated_at == expected
    assert expected.utcoffset() == timedelta(0) == info(ns, 0).created_at.utcoffset()


def test_a_datetime_is_the_time_that_files_show() -> None:
    now = info(1_764_025_718_123_456_789, 0)
    assert rfc3339(now.created).startswith(now.created_at.isoformat()[: len("2025-11-24T23:08:38.123456")])


def test_the_datetimes_follow_the_numbers() -> None:
    made = info(DAY, 3 * DAY)
    assert made.updated_at - made.created_at == timedelta(days=2)
