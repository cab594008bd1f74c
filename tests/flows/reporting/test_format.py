"""Figures as people say them, in tables and in charts."""

import pytest

from flows.reporting.format import duration, number, short_number, short_size, size


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (duration(0.44), "0.4 s"),
        (duration(59.4), "59 s"),
        (duration(59.6), "1 min 00 s"),
        (duration(185), "3 min 05 s"),
        (duration(7830), "2 h 10 min"),
        (duration(59.4, tenths_below_s=60), "59.4 s"),
        (duration(62, tenths_below_s=60), "1 min 02 s"),
        (size(940), "940 B"),
        (size(-5000), "-5.0 kB"),
        (size(146_000_000), "146.0 MB"),
        (size(5.6e9), "5.60 GB"),
        (short_size(12), "12 B"),
        (short_size(4_600), "4.6 kB"),
        (short_size(14.6e6), "14.6 MB"),
        (short_size(146e6), "146 MB"),
        (short_size(3.4e9), "3.4 GB"),
        (number(None), "-"),
        (number(21.714), "21.71"),
        (number(134_515_008.0), "134,515,008"),
        (number(float("inf")), "inf"),
        (number(float("nan")), "nan"),
        (short_number(0), "0"),
        (short_number(12345), "12,345"),
        (short_number(1234567), "1.23e+06"),
        (short_number(0.84212), "0.8421"),
        (short_number(0.00012), "0.00012"),
    ],
)
def test_figures_are_said_as_people_say_them(made, said):
    assert made == said
