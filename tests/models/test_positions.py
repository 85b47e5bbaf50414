"""Position encodings as configurations name them."""

import pytest

from newllm.errors import UserError
from newllm.models.positions import create_position, position_spec


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "wide"])
@pytest.mark.parametrize(("kind", "option"), [("alibi", "slope"), ("rope", "base"), ("rope", "fraction")])
def test_a_value_that_means_nothing_is_refused(kind, option, value):
    """An infinite slope is 0 · ∞ for the token itself: not a number, in every logit."""
    with pytest.raises(UserError, match=f"position option {option} is .*: it must be a finite number greater than 0"):
        create_position({"type": kind, option: value})


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "none"},
        {"type": "rope", "fraction": 0.5, "base": 500.0},
        {"type": "alibi", "slopes": "geometric", "slope": 0.0625},
    ],
)
def test_a_complete_spec_makes_what_it_was_made_of(spec):
    assert position_spec(create_position(spec)) == spec


def test_a_slope_that_no_head_would_have_is_refused():
    with pytest.raises(UserError, match=r"position option slope is 0\.25: it is that of slopes=uniform"):
        create_position({"type": "alibi", "slopes": "geometric", "slope": 0.25})
