"""What may be asked of a model that continues a text: names, types and ranges."""

import math

import numpy as np
import pytest

from stages.runtime.contract import StageError
from stages.serving.generation import NEW_TOKENS, PARAMETERS, Generation, generation


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("max_new_tokens", 0, "at least 1"),
        ("max_new_tokens", -5, "at least 1"),
        ("temperature", -0.1, "a number from 0 on"),
        ("temperature", math.nan, "a number from 0 on"),
        ("temperature", math.inf, "a number from 0 on"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_p", 1.1, "a number above 0, at most 1"),
        ("top_p", math.nan, "a number above 0, at most 1"),
        ("repetition_penalty", 1e-40, "a number from 0.01 to 100.0"),
        ("repetition_penalty", math.inf, "a number from 0.01 to 100.0"),
        ("seed", -1, "at least 0"),
    ],
)
def test_value_out_of_range_is_refused_with_its_measure_and_limit(name, value, limit):
    for make in (lambda: Generation(**{name: value}), lambda: generation({name: value})):
        with pytest.raises(StageError) as told:
            make()
        assert told.value.what == f"{name} is out of range" and told.value.limit == limit and told.value.remedy
        assert math.isnan(value) or told.value.measured == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"temperatur": 1},
            r"no parameter 'temperatur'; limit max_new_tokens, .*seed, beams. Perhaps temperature is meant",
        ),
        ({"lines": 4}, "no parameter 'lines'; .* Leave it out"),
        ({"beams": 2.5}, "beams is no whole number; measured 2.5"),
        ({"max_new_tokens": "4"}, "max_new_tokens is no whole number; measured '4'"),
        ({"max_new_tokens": 4.5}, "max_new_tokens is no whole number; measured 4.5"),
        ({"temperature": 10**400}, "temperature is out of range; measured inf"),
        ({"max_new_tokens": math.inf}, "max_new_tokens is no whole number; measured inf"),
        ({"top_k": True}, "top_k is no whole number; measured True"),
        ({"temperature": "hot"}, "temperature is no number; measured 'hot'"),
        ({"temperature": False}, "temperature is no number; measured False"),
        ({"top_p": [0.5]}, "top_p is no number"),
        ({"stop": 3}, "stop is no text; measured 3"),
        ({"stop": ["a", 3]}, "stop is no text"),
        ({"stop": ["a", ""]}, "stop strings are out of range; measured one of 0 characters"),
        ({"stop": "x" * 1001}, "measured one of 1001 characters; limit 16 of 1 to 1000 characters"),
        ({"stop": ["x"] * 17}, "measured 17 of them"),
    ],
)
def test_name_or_type_that_means_nothing_is_refused(given, said):
    with pytest.raises(StageError, match=said):
        generation(given)


def test_values_come_as_json_and_numpy_have_them():
    asked = {
        "max_new_tokens": np.int64(4),
        "temperature": np.float32(0.5),
        "top_k": 3.0,
        "top_p": 1,
        "repetition_penalty": np.float64(1.5),
        "stop": np.array(["a", "b"]),
        "seed": None,
        "beams": None,
    }
    assert set(asked) == set(PARAMETERS)
    wanted = Generation(max_new_tokens=4, temperature=0.5, top_k=3, repetition_penalty=1.5, stop=("a", "b"))
    assert generation(asked) == wanted and type(generation(asked).top_k) is int
    assert generation({"seed": 10**400}).seed == 10**400
    assert generation({"stop": "a"}).stop == ("a",) and generation({}) == Generation()


def test_number_of_new_tokens_fits_the_model():
    assert Generation().most(4096) == NEW_TOKENS and Generation().most(16) == 16
    assert Generation(max_new_tokens=16).most(16) == 16
    with pytest.raises(StageError, match="measured 17; limit 16 tokens"):
        Generation(max_new_tokens=17).most(16)
