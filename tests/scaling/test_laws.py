"""Every law of recipes/law: what the fit relies on, whatever the formula is (units, derivatives, linearity, order)."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lowprec.scaling.law import LAWS_FOLDER, LawFile, load_law, pivots_of
from lowprec.scaling.laws import LAWS
from lowprec.scaling.laws.curves import History, curve_points
from lowprec.scaling.laws.kumar import Kumar
from lowprec.scaling.table import LABELS, NUMBERS, RunTable

FILES = sorted(path.stem for path in LAWS_FOLDER.glob("*.yaml"))
# the same laws with their other options
VARIANTS = [
    *((name, {}) for name in FILES),
    ("chinchilla", {"tied": True}),
    ("data_constrained", {"tied": False}),
    ("data_constrained", {"excess": False}),
    ("kumar", {"offsets": True, "tied": False}),
    ("kumar", {"operands": ["w"]}),
    ("qat", {"joint": False}),
    ("efficiency", {"eff_D": "precision"}),
    ("efficiency", {"gamma": "free"}),
    ("capacity", {"gradients": True}),
    ("delta", {"shared": True}),
    ("multi_power", {"warmup": True}),
]
every_law = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}{''.join(o)}" for n, o in VARIANTS])


def sample_table() -> RunTable:
    """24 runs with every column, of four kinds: unquantised, weights alone, activations alone, all."""
    frame = pd.DataFrame([(n, d, kind) for n in (3e7, 1e8, 4e8) for d in (2e9, 2e10) for kind in range(4)])
    frame.columns = ["N", "D", "kind"]
    kind = frame["kind"]
    w, a = (kind == 1) | (kind == 3), (kind == 2) | (kind == 3)
    frame = frame.assign(
        run=[f"r{i}" for i in range(len(frame))],
        precision=kind.map({0: "bf16", 1: "w4", 2: "a4", 3: "nvfp4"}),
        bits_w=np.where(w, 4.0, 16.0), bits_a=np.where(a, 4.0, 16.0), bits_kv=np.where(kind == 3, 6.0, 16.0),
        bits_post=kind.map({0: 16.0, 1: 3.0, 2: 8.0, 3: 3.0}),
        exponent_bits=np.where(w, 2.0, 8.0), mantissa_bits=np.where(w, 1.0, 7.0), block=np.where(w | a, 32.0, 1.0),
        gmse_w=np.where(w, 0.009, 0.0), gmse_a=np.where(a, 0.012, 0.0), gmse_g=np.where(kind == 3, 0.02, 0.0),
        quantized_frac=kind.map({0: 0.0, 1: 0.5, 2: 0.8, 3: 1.0}),
        qat_frac=kind.map({0: 0.0, 1: 0.3, 2: 0.0, 3: 1.0}),
        unique_tokens=frame["D"] / (1 + 3 * (kind == 2)), N_mean=frame["N"] * (1 - 0.2 * (kind == 1)),
        optimizer=np.where(np.arange(len(frame)) % 5 < 2, "Muon", "AdamW"),
    )  # fmt: skip
    for operand in ("fprop.w", "dgrad.dy"):
        frame[operand] = np.where(frame["precision"] == "nvfp4", f"{operand} nvfp4", "bf16")
    return RunTable(frame.drop(columns="kind"))


def curve_table() -> RunTable:
    """Points of a constant, a linearly decayed and a stepped learning rate."""
    step = np.arange(100.0, 2001.0, 100.0)
    shapes = {
        "constant": step * 0 + 1e-3,
        "linear": 1e-3 * (1.05 - step / 2000),
        "stepped": np.where(step < 900, 1e-3, 2e-4),
    }
    curves = {name: pd.DataFrame({"step": step, "lr": lr, "loss": 3 + step**-0.5}) for name, lr in shapes.items()}
    table = RunTable(pd.DataFrame({"run": list(curves), "curve": list(curves), "N": 1e8, "D": 1e9}))
    return curve_points(table, reader=lambda name: curves[name])


def columns_of(law: LawFile) -> dict[str, np.ndarray]:
    return (curve_table() if "curve" in law.law.needs else sample_table()).columns(names_of(law))


def names_of(law: LawFile) -> tuple[str, ...]:
    """What the law needs and what it uses if it is there."""
    return (*law.law.needs, "bits_kv") if isinstance(law.law, Kumar) else law.law.needs


def middle(law: LawFile, columns: dict) -> dict[str, float]:
    """Plausible pivoted parameters: the middle of the start grid, and different values for linear coefficients."""
    theta = {}
    for i, p in enumerate(law.parameters(columns)):
        if p.fixed is not None:
            theta[p.name] = p.fixed
        elif p.start:
            theta[p.name] = p.start[len(p.start) // 2] * (1 + 0.01 * i)
        else:
            theta[p.name] = 1.5 if p.name in ("E", "L0") else 0.2 + 0.05 * i
    return theta


def pivoted(law: LawFile, columns: dict) -> tuple[dict, dict[str, float]]:
    pivots = pivots_of(law.law, columns)
    return {k: v / pivots[k] if k in pivots else v for k, v in columns.items()}, pivots


@every_law
def test_a_complex_step_gives_the_derivative_of_central_differences(name, options):
    law = load_law(name, **options)
    columns, _ = pivoted(law, columns_of(law))
    prepared, theta = law.law.prepare(columns), middle(law, columns)
    for key, value in theta.items():
        h = 1e-6 * max(abs(value), 1e-2)
        up, down = (law.law.loss({**theta, key: value + sign * h}, prepared) for sign in (1, -1))
        exact = np.imag(law.law.loss({**theta, key: value + 1e-20j}, prepared)) / 1e-20
        slope = np.broadcast_to((up - down) / (2 * h), np.shape(up))
        assert np.isfinite(up).all()
        # an error of h^2/6 f''' in the truncation and of eps f/h in the rounding
        np.testing.assert_allclose(np.broadcast_to(exact, np.shape(up)), slope, rtol=1e-5, atol=1e-9 / h * 1e-5)


@every_law
def test_every_parameter_matters_to_some_run(name, options):
    law = load_law(name, **options)
    columns, _ = pivoted(law, columns_of(law))
    prepared, theta = law.law.prepare(columns), middle(law, columns)
    for key, value in theta.items():
        slope = np.imag(law.law.loss({**theta, key: value + 1e-20j}, prepared)) / 1e-20
        assert np.abs(slope).max() > 1e-9, key


@every_law
def test_natural_coefficients_follow_from_the_pivoted_ones_by_their_units(name, options):
    law = load_law(name, **options)
    raw = columns_of(law)
    columns, pivots = pivoted(law, raw)
    theta = middle(law, columns)
    natural = dict(theta)
    for p in law.parameters(columns):
        for column, exponent in p.unit.items():
            power = -theta[exponent[1:]] if exponent.startswith("-") else theta[exponent]
            natural[p.name] *= pivots[column] ** power
    expected = law.law.loss(theta, law.law.prepare(columns))
    np.testing.assert_allclose(law.law.loss(natural, law.law.prepare(raw)), expected, rtol=1e-10)


@every_law
def test_the_response_is_linear_in_the_coefficients_that_say_so(name, options):
    """loss = sum of coefficient x loss with that coefficient 1 and the others 0."""
    law = load_law(name, **options)
    columns, _ = pivoted(law, columns_of(law))
    prepared, theta = law.law.prepare(columns), middle(law, columns)
    linear = [p.name for p in law.parameters(columns) if p.linear]
    none = {**theta, **dict.fromkeys(linear, 0.0)}
    offset = law.law.loss(none, prepared)
    total = offset + sum(theta[key] * (law.law.loss({**none, key: 1.0}, prepared) - offset) for key in linear)
    np.testing.assert_allclose(total, law.law.loss(theta, prepared), rtol=1e-12)
    assert linear


@every_law
def test_the_order_of_the_runs_and_their_number_change_nothing(name, options):
    law = load_law(name, **options)
    columns, _ = pivoted(law, columns_of(law))
    theta = middle(law, columns)
    whole = law.law.loss(theta, law.law.prepare(columns))
    rows = np.random.default_rng(0).permutation(len(whole))[: len(whole) // 2]
    part = law.law.loss(theta, law.law.prepare({k: v[rows] for k, v in columns.items()}))
    np.testing.assert_allclose(part, whole[rows], rtol=1e-13)


@every_law
def test_one_more_run_of_a_known_kind_needs_no_new_parameter(name, options):
    """What a fit is asked to predict later is part of what it was fitted to."""
    law = load_law(name, **options)
    columns = columns_of(law)
    names = {p.name for p in law.parameters(columns)}
    for i in range(len(next(iter(columns.values())))):
        assert {p.name for p in law.parameters({k: v[i : i + 1] for k, v in columns.items()})} <= names


@pytest.mark.parametrize("name", FILES)
def test_a_law_file_says_what_it_is_and_where_its_numbers_are_from(name):
    path = LAWS_FOLDER / f"{name}.yaml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    law = load_law(name)
    assert first.startswith("# ") and ("arXiv:" in first or "own" in first)
    assert type(law.law).__doc__ and law.law.formula and law.huber > 0
    assert set(law.law.needs) <= {*NUMBERS, *LABELS, "step", "history"}
    for entry in law.published.values():
        assert entry["source"] and "values" in entry
        assert set(entry) <= {"source", "note", "values"}


def test_every_class_has_a_file():
    assert {type(load_law(name).law) for name in FILES} == set(LAWS.values())


PUBLISHED = [(name, key) for name in FILES for key in load_law(name).published]


@pytest.mark.parametrize(("name", "key"), PUBLISHED)
def test_published_coefficients_lie_within_the_bounds_and_predict_finite_losses(name, key):
    """Bounds are of pivoted values: at 1e8 parameters and 1e10 tokens, the middle of most ladders."""
    values = load_law(name).published[key]["values"]
    options = {"joint": False} if "both" in values else {"warmup": True} if name == "multi_power" else {}
    options |= {"offsets": True} if "P0_w" in values else {}
    law = load_law(name, **options)
    raw = published_columns(law, values)
    middles = {"N": 1e8, "N_mean": 1e8, "D": 1e10, "unique_tokens": 1e10}
    pivots = {column: middles[source] for column, source in law.law.pivots.items() if source in middles}
    params = {
        p.name: p for p in law.parameters({k: v / pivots.get(k, 1) if k in pivots else v for k, v in raw.items()})
    }
    assert set(values) <= set(params)
    for key_, value in values.items():
        scale = 1.0
        for column, exponent in params[key_].unit.items():
            sign = -1 if exponent.startswith("-") else 1
            scale *= pivots[column] ** (sign * values[exponent.lstrip("-")])
        high = params[key_].high
        assert params[key_].low <= value / scale <= (10 if high is None else high), key_
    free = {p.name for p in params.values() if p.fixed is None} - set(values)
    if not free:
        assert np.isfinite(law.law.loss(values, law.law.prepare(raw))).all()
    else:  # published only in part: said so
        assert law.law.certainty or load_law(name).published[key].get("note")


def published_columns(law: LawFile, values: dict) -> dict[str, np.ndarray]:
    """One run for every label of the published values, with the columns that the law needs."""
    labels = sorted({key.partition("[")[2][:-1] for key in values if "[" in key} - {"w", "a", "wa"}) or ["nvfp4"]
    if "curve" in law.law.needs:
        return columns_of(law)
    base = sample_table().frame.iloc[[3]]
    frame = pd.concat([base] * len(labels), ignore_index=True)
    frame["precision"] = [label.rpartition("|")[2] for label in labels]
    frame["optimizer"] = [label.partition("|")[0] for label in labels]
    for operand, prefix in (("fprop.w", "eff_N"), ("dgrad.dy", "eff_D")):
        frame[operand] = [label if f"{prefix}[{label}]" in values else "bf16" for label in labels]
    if "k[a]" in values:
        frame = sample_table().frame if "k[w]" in values else sample_table().frame.iloc[[2]]
    return RunTable(frame).columns(names_of(law))


# --- laws in N eff_N and D eff_D ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.2, 1.0), st.floats(0.5, 1.0), st.floats(0.1, 0.6), st.floats(0.1, 0.6), st.floats(0.2, 1.0),
    st.floats(18, 24),
)  # fmt: skip
def test_a_speed_up_of_one_over_both_efficiencies_breaks_even(eff_N, eff_D, alpha, beta, gamma, log_C):
    """min over N of the loss at C = 6 N D / s is that of bf16 iff s eff_N eff_D = 1, by brute force."""
    law = load_law("efficiency", gamma="free", eff_D="precision").law
    theta = {"E": 1.5, "A": 10 * 1e8**alpha, "B": 7 * 1e10**beta, "alpha": alpha, "beta": beta, "gamma": gamma,
             "eff_N[fp4]": eff_N, "eff_D[fp4]": eff_D}  # fmt: skip

    def best(label: str, speedup: float) -> float:
        columns = {"precision": np.array([label], dtype=object)}

        def loss(log_N: float) -> float:
            N = np.array([np.exp(log_N)])
            return float(law.loss(theta, law.prepare({"N": N, "D": speedup * 10**log_C / (6 * N), **columns}))[0])

        return minimize_scalar(loss, bounds=(np.log(1e2), np.log(1e18)), method="bounded", options={"xatol": 1e-6}).fun

    even = 1 / (eff_N * eff_D)
    assert best("fp4", even) == pytest.approx(best("bf16", 1.0), abs=1e-7)
    assert best("fp4", 1.05 * even) < best("bf16", 1.0) < best("fp4", 0.95 * even)


def test_a_reference_has_efficiency_one_exactly():
    law = load_law("efficiency", eff_D="precision").law
    theta = {"eff_N[fp4]": 0.7, "eff_D[fp4]": 0.9}
    assert law.effective(theta, "BF16") == (1.0, 1.0) and law.effective(theta, "fp4") == (0.7, 0.9)
    assert law.efficiencies(theta) == {"fp4": (0.7, 0.9)}
    rows = law.effective(theta, {"precision": np.array(["bf16", "fp4"], dtype=object)})
    assert [list(v) for v in rows] == [[1.0, 0.7], [1.0, 0.9]]
    exact = load_law("capacity").law.effective({"F": 0.4, "C": 2.0}, {"gmse_w": np.zeros(1), "gmse_a": np.zeros(1)})
    assert exact[0] == 1.0


def test_a_label_without_a_fitted_parameter_is_named():
    law = load_law("efficiency").law
    with pytest.raises(ValueError, match=r"no eff_N\[int3\].*there are eff_N\[fp4\]"):
        law.effective({"eff_N[fp4]": 0.7}, "int3")


def test_numbers_are_labels_too():
    law = load_law("efficiency", eff_N="bits_w").law
    columns = {"N": np.ones(3), "D": np.ones(3), "bits_w": np.array([16.0, 4.0, 2.5])}
    assert [p.name for p in law.params(columns) if "[" in p.name] == ["eff_N[2.5]", "eff_N[4]"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("chinchilla", {"tied": "yes"}, "option tied is 'yes'; it can be true or false"),
        ("chinchilla", {"exponents": 3}, "no option 'exponents'"),
        ("efficiency", {"gamma": 2}, "option gamma is 2; it can be 1 or free"),
        ("efficiency", {"eff_N": None}, "needs eff_N or eff_D"),
        ("kumar", {"operands": ["w", "g"]}, "it lists some of w, a, kv"),
        ("annealing", {"memory": 1.0}, "below 1"),
        ("multi_power", {"bins": 0}, "whole number"),
    ],
)
def test_a_wrong_option_is_answered_in_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_law(name, **options)


def test_data_that_a_law_is_not_about_is_refused():
    table = sample_table()
    for name, change, sentence in (
        ("floating_point", {"block": 0.5}, "number of values that share a scale"),
        ("qat", {"block": 32.0, "bits_w": np.where(np.arange(24) % 2, 4.0, 8.0)}, "about one bit width.*4, 8"),
        ("qat", {"block": 1.0}, "share a scale"),
        ("capacity", {"gmse_w": 1.2}, r"not in \[0, 1\)"),
        ("mixed_quantization", {"quantized_frac": 85.0}, "not in 0..1"),
        ("compute_optimal_qat", {"qat_frac": 0.0}, "must be above 0"),
    ):
        law = load_law(name)
        columns = RunTable(table.frame.assign(**change)).columns(law.law.needs)
        with pytest.raises(ValueError, match=sentence):
            law.law.loss(middle(law, columns), law.law.prepare(columns))


def test_bits_that_no_fitted_run_had_are_refused():
    law = load_law("kumar").law
    with pytest.raises(ValueError, match="no gamma_kv: no run was fitted with fewer than 16 bits in bits_kv"):
        law.effective({"gamma_w": 2.0, "gamma_a": 2.0}, {"bits_w": 4.0, "bits_a": 4.0, "bits_kv": 8.0})


def test_a_cache_of_which_nothing_is_known_is_left_alone():
    law = load_law("kumar").law
    theta, bits = {"gamma_w": 2.0, "gamma_a": 2.0, "gamma_kv": 1.5}, {"bits_w": 4.0, "bits_a": 4.0}
    assert law.effective(theta, bits) == law.effective(theta, {**bits, "bits_kv": 16.0})
    columns = {name: np.full(2, value) for name, value in {**bits, "N": 1e8, "D": 1e9}.items()}
    assert [p.name for p in law.params(columns)][-2:] == ["gamma_w", "gamma_a"]


def test_histories_of_one_learning_rate_agree_however_densely_it_was_logged():
    step = np.arange(1.0, 20001.0)
    lr = 1e-3 * np.minimum(step / 500, 1) * np.where(step > 15000, (20000 - step) / 5000, 1.0)
    dense, sparse = History.of(step, lr, knots=128), History.of(step[99::100], lr[99::100])
    at = np.array([500.0, 7000.0, 16000.0, 20000.0])
    exact = np.cumsum(lr)[at.astype(int) - 1]
    np.testing.assert_allclose(dense.S1(at), exact, rtol=1e-6)
    np.testing.assert_allclose(sparse.S1(at), exact, rtol=1e-6)
    assert len(dense.steps) <= 128
