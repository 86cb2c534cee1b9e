"""Laws against numbers of their papers, by hand, and against public run tables if those are there."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from tables import table as run_table

from lowprec.scaling.law import load_law
from lowprec.scaling.laws.capacity import capacity

ONE = np.ones(1)


def label(name: str) -> np.ndarray:
    return np.array([name], dtype=object)


def predict(name: str, key: str, options: "dict | None" = None, **columns) -> float:
    """Loss of one run from published coefficients."""
    law = load_law(name, **(options or {}))
    columns = {k: label(v) if isinstance(v, str) else v * ONE for k, v in columns.items()}
    return float(law.law.loss(law.published[key]["values"], law.law.prepare(columns))[0])


def test_losses_computed_by_hand():
    """Plain arithmetic with the published coefficients, written out separately."""
    assert predict("chinchilla", "besiroglu", N=1e9, D=2e10) == pytest.approx(2.5291580373, rel=1e-9)
    # arXiv:2305.16264: four epochs of 1e10 tokens are worth 3.73e10, 4.2e9 parameters 2.52e9 of 5.10e8 deserved
    muennighoff = {"key": "muennighoff_c4", "unique_tokens": 1e10}
    assert predict("data_constrained", **muennighoff, N=4.2e9, D=4e10) == pytest.approx(2.3991524213, rel=1e-9)
    assert predict("data_constrained", **muennighoff, N=1e8, D=4e10) == pytest.approx(2.9334111533, rel=1e-9)
    assert predict("data_constrained", **muennighoff, N=1e8, D=1e10) == pytest.approx(3.0976413460, rel=1e-9)
    assert predict("kumar_ptq", "kumar", N=220e6, D=26e9, bits_post=4.0) == pytest.approx(0.01758613197, rel=1e-9)
    sun = {"key": "sun", "exponent_bits": 4.0, "mantissa_bits": 3.0, "block": 32.0}
    assert predict("floating_point", **sun, N=1e9, D=1e11) == pytest.approx(2.5629437747, rel=1e-8)
    assert predict("efficiency", "quest", N=1e8, D=1e10, precision="w4a4") == pytest.approx(2.9567591975, rel=1e-9)
    quartet = {"fprop.w": "mxfp4_quest", "dgrad.dy": "mxfp4_sr"}
    assert predict("quartet", "quartet", N=1e8, D=1e10, **quartet) == pytest.approx(2.9732849846, rel=1e-9)
    assert predict("qid", "ouyang", N=1e9, D=3e11, bits_post=4.0) == pytest.approx(0.07931259103, rel=1e-9)
    assert capacity(0.01, 0.4, 1.5) == pytest.approx(0.810011535241, rel=1e-11)
    assert capacity(0.0625, 0.4, 1.5) == pytest.approx(0.541113280456, rel=1e-11)  # tanh(.8)^1.5: two bits


def test_kumar_with_and_without_offsets():
    law = load_law("kumar")
    values = dict(law.published["kumar"]["values"])
    bits = {"bits_w": 4 * ONE, "bits_a": 8 * ONE, "bits_kv": 16 * ONE}
    with_offsets = load_law("kumar", offsets=True).law.effective(values, bits)[0]
    assert with_offsets == pytest.approx(0.620148633944, rel=1e-4)  # P0 = n gamma is printed to four digits
    for key in ("P0_w", "P0_a", "P0_kv"):
        del values[key]
    assert law.law.effective(values, bits)[0] == pytest.approx(0.755098323268, rel=1e-11)
    loss = law.law.loss(values, law.law.prepare({"N": 1e8 * ONE, "D": 1e10 * ONE, **bits}))
    assert loss == pytest.approx(3.48771265505, rel=1e-10)


def test_kumar_unified_adds_nothing_where_training_was_no_finer_than_serving():
    law = load_law("kumar_unified").law
    values = {**load_law("kumar_unified").published["kumar"]["values"], "C_w": 1.0, "C_a": 1.0, "C_kv": 1.0}
    columns = {"N": 1e8, "D": 1e10, "bits_w": 8.0, "bits_a": 8.0, "bits_kv": 16.0, "bits_post": 4.0}
    columns = {k: v * ONE for k, v in columns.items()}
    assert law.gap(values, columns) == pytest.approx(0.01407067386, rel=1e-9)
    assert law.loss(values, columns) == pytest.approx(3.4514269387, rel=1e-10)
    for post in (8.0, 10.0, 16.0):
        assert law.gap(values, {**columns, "bits_post": post * ONE}) == 0


def test_critical_data_sizes_of_sun_et_al():
    """T5: 1730T, 27T and 0.4T tokens for a model of 1B parameters and blocks of 128."""
    law = load_law("floating_point")
    values = law.published["sun"]["values"]
    for bits, tokens in (((8, 7), 1.73e15), ((4, 3), 2.73e13), ((2, 1), 3.93e11)):
        found = law.law.critical_tokens(values, 1e9, *bits, 128)
        assert found == pytest.approx(tokens, rel=2e-3)
        D = found * np.array([0.9, 1.0, 1.1])
        E, M, block = (np.full(3, v) for v in (*bits, 128.0))
        columns = {"N": np.full(3, 1e9), "D": D, "exponent_bits": E, "mantissa_bits": M, "block": block}
        loss = law.law.loss(values, law.law.prepare(columns))
        assert loss[1] < loss[0] and loss[1] < loss[2]  # more data beyond it hurts
    assert law.law.critical_tokens(values, 1e9, 4, 3, 1) == np.inf
    assert [law.law.best_split(values, bits) for bits in (4, 8, 16)] == [(2, 1), (4, 3), (8, 7)]


def test_qat_coefficients_agree_with_one_another():
    """W4A4 measured against .906 (W4A16 + W16A4), at the corners of the fitted range (by hand)."""
    law = load_law("qat")
    joint, parts = (law.published[key]["values"] for key in ("chen_w4a4", "chen_parts"))
    for N, D, G, w4a4, w4, a4 in (
        (74e6, 10e9, 32, 0.0585761996, 0.0271909212, 0.0388606983),
        (595e6, 100e9, 32, 0.0440885522, 0.0186430535, 0.0287217435),
        (595e6, 100e9, 128, 0.0572794495, 0.0209963634, 0.0399568855),
    ):
        assert law.law.part(joint, "wa", N, D, G) == pytest.approx(w4a4, rel=1e-8)
        assert law.law.part(parts, "w", N, D, G) == pytest.approx(w4, rel=1e-8)
        assert law.law.part(parts, "a", N, D, G) == pytest.approx(a4, rel=1e-8)
        both = load_law("qat", joint=False).law
        columns = {"N": N, "D": D, "bits_w": 4.0, "bits_a": 4.0, "block": G}
        gap = both.gap(parts, both.prepare({k: v * ONE for k, v in columns.items()}))
        assert gap == pytest.approx(0.906 * (w4 + a4), rel=1e-8)
        assert gap == pytest.approx(w4a4, rel=0.04)


def test_share_of_quantised_training():
    law = load_law("compute_optimal_qat").law
    assert law.predicted_share(1e9, 1e11, 4) == pytest.approx(0.280787263938, rel=1e-11)  # exp(-6.7297 / ln 200)
    assert law.predicted_share(86e6, 1e10, 2) == pytest.approx(0.334327519101, rel=1e-11)
    assert law.predicted_share(1e9, 1e8, 4) == 0.0
    theta = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.28, "theta": 0.1, "phi": 1.0, "lambda": 1.0,
             "kappa": 1.0, "chi": 0.5, "psi": 0.1, "omega": 0.5, "mu": 0.5, "nu": 0.1, "xi": -0.5,
             "rho": 0.5}  # fmt: skip
    # phi f^-.5 + lambda (1-f)^.5 f^-.5 with equal constants and S^0: the more the better
    assert law.best_share(theta, 1e8, 1e8 * 4 / 8, 4) == 0.999
    theta |= {"xi": 0.5, "rho": 0.0, "omega": 0.5}  # f^-.5 + (1-f)^-.5: symmetric
    assert law.best_share(theta, 1e8, 1e8 * 4 / 8, 4) == pytest.approx(0.5, abs=2e-3)


def test_every_precision_has_its_own_gap():
    """.05 nats for quartet2 and .07 for nvidia at 1e8 parameters and 1e10 tokens, none for bf16."""
    law = load_law("delta")
    columns = {"N": np.full(3, 1e8), "D": np.full(3, 1e10),
               "precision": np.array(["nvidia", "bf16", "quartet2"], dtype=object)}  # fmt: skip
    gaps = law.law.gap(law.published["nvfp4_30m_to_100m"]["values"], law.law.prepare(columns))
    assert gaps == pytest.approx([0.07, 0.0, 0.05], rel=1e-4)


def test_helpers_invert_their_laws():
    mixed = load_law("mixed_quantization").law
    theta = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.34, "beta": 0.28, "k[nvfp4]": 2.0, "g": 1.5, "gamma_N": 0.2}
    share = mixed.largest_share(theta, "nvfp4", 1e8, 0.02)
    columns = {"N": 1e8 * ONE, "D": 1e10 * ONE, "precision": label("nvfp4"), "quantized_frac": share * ONE}
    assert mixed.gap(theta, mixed.prepare(columns)) == pytest.approx(0.02, rel=1e-12)
    assert mixed.largest_share(theta, "nvfp4", 1e20, 0.02) == 1.0
    kbit = load_law("kbit_inference").law
    assert kbit.best_bits({"E": 1.0, "A[3]": 30.0, "A[4]": 20.0, "A[16]": 25.0, "alpha": 0.1}) == 4.0


# --- public run tables ---------------------------------------------------------------------------------------------


def huber(residuals: np.ndarray, delta: float) -> float:
    size = np.abs(residuals)
    return float(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum())


def quest_label(key: str) -> str:
    key = key.removesuffix(".0")
    if key.endswith("NOH"):
        return f"w{key[:-3]}a{key[:-3]}_no_hadamard"
    names = {"16": "bf16", "fp4": "fp4", "2.5": "int4_2:4"}
    return names.get(key) or (f"w{key[:-2]}a16" if key.endswith("WO") else f"w{key}a{key}")


def test_quest_published_coefficients_reach_their_published_cost():
    """7.384e-10: half the sum of squares of log residuals times 1e-6 (the authors scale residuals by 1e-3)."""
    frame = pd.read_csv(run_table("quest_runs.csv"))
    law = load_law("efficiency")
    columns = {"N": frame["N"].to_numpy(float), "D": frame["D"].to_numpy(float),
               "precision": np.array([quest_label(str(k)) for k in frame["law_key"]], dtype=object)}  # fmt: skip
    predicted = law.law.loss(law.published["quest"]["values"], law.law.prepare(columns))
    residuals = np.log(predicted / frame["loss"].to_numpy())
    assert 0.5e-6 * np.sum(residuals**2) == pytest.approx(7.384e-10, rel=2e-4)


def test_quartet_published_coefficients_reach_their_published_cost():
    """2.12922e-6 on BF16; and each published efficiency is the minimum of the same objective on its runs."""
    frame = pd.read_csv(run_table("quartet_mxfp4_runs.csv"))
    law = load_law("quartet")
    values = law.published["quartet"]["values"]
    forward = {"BF16": "bf16", "QuEST": "mxfp4_quest"}
    backward = {"BF16": "bf16", "AlbertTsengQuantizer": "mxfp4_sr"}

    def cost(fwd: str, bwd: str, **changes: float) -> float:
        part = frame[(frame["fwd"] == fwd) & (frame["bwd"] == bwd)]
        columns = {"N": part["N"].to_numpy(float), "D": part["D"].to_numpy(float),
                   "fprop.w": np.array([forward[fwd]] * len(part), dtype=object),
                   "dgrad.dy": np.array([backward[bwd]] * len(part), dtype=object)}  # fmt: skip
        predicted = law.law.loss({**values, **changes}, law.law.prepare(columns))
        return huber(np.log(predicted / part["loss"].to_numpy()), 1e-4)

    assert cost("BF16", "BF16") == pytest.approx(2.1292178288767156e-06, rel=1e-6)
    for fwd, bwd, key in (("QuEST", "BF16", "eff_N[mxfp4_quest]"), ("BF16", "AlbertTsengQuantizer", "eff_D[mxfp4_sr]")):
        best = minimize_scalar(
            lambda e, fwd=fwd, bwd=bwd, key=key: 1e6 * cost(fwd, bwd, **{key: e}), bounds=(0.4, 1.1), method="bounded"
        )
        assert best.x == pytest.approx(values[key], rel=1e-3)
