"""What benchmarks make of a profile."""

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not beside the tests")
from benchmarks.lib.profile import Event
from benchmarks.lib.timing import busy


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(5, 3)], 3),
        ([(0, 10), (10, 5), (20, 5)], 20),
        ([(0, 10), (2, 10)], 12),  # the second starts early
        ([(0, 10), (2, 3), (8, 4)], 12),
        ([(8, 4), (0, 10)], 12),
    ],
)
def test_busy(spans, expected):
    """Of spans (start, duration): what overlaps counts once, and pauses do not count."""
    events = [Event("device", "module", float(start), float(duration), "", "") for start, duration in spans]
    assert busy(events) == expected
