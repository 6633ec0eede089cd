"""Fields of files: each kind of value is taken in its range, and anything else is an error that names the field."""

import math

import pytest

from rsengine.checked import MOST_ITEMS, Field, FieldError, shown


def test_values_in_their_range_come_back():
    content = Field.of_json('{"size": [3, 4], "mean": 0.5, "count": 7, "name": "é", "raw": true, "none": null}')
    assert [side.integer(1, 4) for side in content["size"].items(2)] == [3, 4]
    assert content["mean"].number(0, 1) == 0.5 and content["count"].number() == 7.0
    assert content["name"].text() == "é" and content["raw"].flag() is True and content["none"].value is None
    assert Field("caf\udce9").text(any_bytes=True) == "caf\udce9"
    assert "none" in content and "more" not in content and len(list(content.fields())) == 6


@pytest.mark.parametrize(
    ("value", "take", "words"),
    [
        ("3", lambda f: f.integer(0, 9), r"expected an integer from 0 to 9; got '3'"),
        (True, lambda f: f.integer(0, 9), "expected an integer from 0 to 9; got True"),
        (3.0, lambda f: f.integer(0, 9), r"expected an integer .* got 3\.0"),
        (10, lambda f: f.integer(0, 9), "expected an integer .* got 10"),
        (10**5000, lambda f: f.integer(0, 9), "got a value of type int too long to show"),
        (math.nan, lambda f: f.number(), "expected a finite number; got nan"),
        (math.nan, lambda f: f.number(0, 1), "expected a number from 0 to 1; got nan"),
        (-math.inf, lambda f: f.number(), "expected a finite number; got -inf"),
        (10**400, lambda f: f.number(), "expected a finite number; got 1000"),
        (-0.1, lambda f: f.number(0, 1), r"expected a number from 0 to 1; got -0\.1"),
        (False, lambda f: f.number(0, 1), "expected a number .* got False"),
        (None, lambda f: f.text(), "expected text; got None"),
        ("\ud800", lambda f: f.text(), "expected text; got "),
        ("x" * (MOST_ITEMS + 1), lambda f: f.text(), "expected text; got 'xxx"),
        (1, lambda f: f.flag(), "expected true or false; got 1"),
        ("ab", lambda f: f.items(), "expected a list; got 'ab'"),
        ([1], lambda f: f.items(2), r"expected a list of 2; got \[1\]"),
        ([0] * (MOST_ITEMS + 1), lambda f: f.items(), "expected a list of at most"),
        ([], lambda f: f.mapping(), r"expected names with values; got \[\]"),
        ({1: 2}, lambda f: f.mapping(), "expected names with values"),
        ({"b": 1}, lambda f: f["a"], r"x\.a: missing"),
        ({"a": {"b": []}}, lambda f: f["a"]["b"].text(), r"x\.a\.b: expected text"),
        ({"a": ["", 0]}, lambda f: [each.text() for each in f["a"].items()], r"x\.a\[1\]: expected text; got 0"),
    ],
    ids=lambda value: type(value).__name__,  # the values themselves may be too long
)
def test_anything_else_is_one_line_that_names_the_field(value, take, words):
    with pytest.raises(FieldError, match=words) as caught:
        take(Field(value, "x"))
    message = str(caught.value)
    assert message.startswith("x") and len(message) < 400 and message.isprintable()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, b"\xff", "1 2"])
def test_what_is_not_json_is_said(text):
    with pytest.raises(FieldError, match=r"options: not valid JSON \("):
        Field.of_json(text, "options")


def test_a_value_is_shown_in_one_short_line():
    assert shown("a\nb") == r"'a\nb'" and len(shown([1] * 10_000)) < 250
    assert "\n" not in shown(type("X", (), {"__repr__": lambda self: "two\nlines"})())
