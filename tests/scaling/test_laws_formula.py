"""A law of one's own from a YAML file: equal to the class, and harmless whoever wrote it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.scaling.fit import fit
from lowprec.scaling.law import load_law
from lowprec.scaling.laws.formula import Formula
from lowprec.scaling.synth import draw, grid_table

PARAMS = {"E": {"linear": True}, "A": {"linear": True}, "alpha": {"low": 0.02, "high": 1.5, "start": [0.2, 0.5]}}


def test_the_shipped_formula_fits_as_chinchilla_does():
    law, chinchilla = load_law("formula"), load_law("chinchilla")
    table = grid_table([3e7, 1e8, 3e8, 1e9], [1e9, 1e10, 1e11])
    truth = chinchilla.published["besiroglu"]["values"]
    runs = draw(chinchilla, truth, table, noise=1e-3, seed=3)
    mine, theirs = fit(law, runs, restarts=2), fit(chinchilla, runs, restarts=2)
    assert mine.objective == pytest.approx(theirs.objective, rel=1e-5)
    assert mine.params["alpha"] == pytest.approx(theirs.params["alpha"], rel=1e-3)
    assert mine.params["A"] * 1e8 ** mine.params["alpha"] == pytest.approx(theirs.params["A"], rel=1e-2)
    np.testing.assert_allclose(mine.predict(runs), theirs.predict(runs), rtol=1e-5)


def test_a_formula_needs_the_columns_it_names():
    law = Formula(expression="E + A * (N * bits_w) ** -alpha + 0 * exp(-bits_a)", params=PARAMS)
    assert law.needs == ("N", "bits_a", "bits_w") and law.pivots == {}
    columns = {"N": np.array([1e8]), "bits_w": np.array([4.0]), "bits_a": np.array([8.0])}
    assert law.loss({"E": 1.0, "A": 2.0, "alpha": 0.1}, columns) == pytest.approx(1 + 2 * 4e8**-0.1)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "E.__class__", "E if A else alpha", "[E, A][0] ** alpha", "E + 'A' * alpha",
        "(lambda: E)()", "exp(E, A) + alpha", "exp(x=E) + A ** alpha", "E and A or alpha", "abs(E) + A ** alpha",
        "E < A", "E := A", "f'{E}'", "E @ A", "E // A", "E ; A", "", "N" * 3000, "E + True * A ** alpha",
        "(" * 500 + "E" + ")" * 500, "-" * 1900 + "E", "lambda: " + "-" * 1900 + "E", f"E + A ** alpha + 1{'0' * 400}",
    ],
)  # fmt: skip
def test_whatever_is_no_arithmetic_is_refused_in_a_sentence(expression):
    with pytest.raises(ValueError, match="formula"):
        Formula(expression=expression, params=PARAMS)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="EA()+-*/.'_[]{}=,: 0123456789\n\tNalphexo", max_size=40))
def test_no_text_does_anything_but_parse_or_raise_a_sentence(text):
    try:
        Formula(expression=text, params=PARAMS)
    except ValueError as error:
        assert "formula" in str(error)


def test_numbers_too_large_are_infinite_and_raise_nothing():
    law = Formula(expression="E + A * 9 ** 9 ** 9 / N ** alpha", params=PARAMS)
    with np.errstate(over="ignore"):
        assert law.loss({"E": 1.0, "A": 1.0, "alpha": 0.1}, {"N": np.ones(2)}).tolist() == [np.inf, np.inf]


def test_parameters_of_a_formula_are_checked():
    for params, sentence in (
        ({"E": {"linear": True, "hgih": 3}}, "no key 'hgih'"),
        ({"E": {"low": 0}}, "needs `start`"),
        ({"E": {"linear": True}, "A": {"linear": True}}, "'A' of the formula does not occur"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Formula(expression="E + 1", params=params)
    with pytest.raises(ValueError, match=r"options\.expression"):
        Formula()
