"""Every law is found again from runs drawn from it: its start grid, bounds and units are fit for fitting."""

import numpy as np
import pandas as pd
import pytest

from lowprec.scaling.fit import fit
from lowprec.scaling.law import LAWS_FOLDER, LawFile, load_law, pivots_of
from lowprec.scaling.table import RunTable

FILES = [path.stem for path in sorted(LAWS_FOLDER.glob("*.yaml"))]
POINTS = [name for name in FILES if "curve" not in load_law(name).law.needs]  # whole curves: test_laws_curves.py
NOISE = 1e-6


def ladder(name: str, seed: int) -> RunTable:
    """64 runs that tell all parameters of a law apart: sizes, tokens, and four kinds of precision at random."""
    frame = pd.DataFrame([(n, d, k) for n in (3e7, 1e8, 3e8, 1e9) for d in (1e9, 4e9, 2e10, 8e10) for k in range(4)])
    frame.columns = ["N", "D", "kind"]
    rng, kind = np.random.default_rng(seed), frame.pop("kind")
    w, a = (kind == 1) | (kind == 3), (kind == 2) | (kind == 3)

    def one_of(*values: object) -> np.ndarray:
        return rng.choice(np.array(values), len(frame))

    widths = name.startswith(("kumar", "compute_optimal"))
    frame = frame.assign(
        run=[f"r{i}" for i in range(len(frame))], precision=kind.map({0: "bf16", 1: "w4", 2: "a4", 3: "nvfp4"}),
        bits_w=np.where(w, one_of(2.0, 4.0, 6.0) if widths else 4.0, 16.0),
        bits_a=np.where(a, one_of(4.0, 6.0, 8.0) if widths else 4.0, 16.0), bits_kv=one_of(4.0, 6.0, 16.0),
        bits_post=one_of(3.0, 4.0, 6.0) if name != "kumar_unified" else one_of(1.0, 2.0, 3.0, 4.0),
        exponent_bits=np.where(w, one_of(2.0, 3.0, 4.0), 8.0), mantissa_bits=np.where(w, one_of(1.0, 2.0, 3.0), 7.0),
        block=np.where(w | a, one_of(16.0, 128.0), 1.0), gmse_w=np.where(w, one_of(0.009, 0.03, 0.1), 0.0),
        gmse_a=np.where(a, one_of(0.012, 0.05), 0.0), quantized_frac=np.where(kind > 0, one_of(0.3, 0.6, 1.0), 0.0),
        qat_frac=np.where(w, one_of(0.1, 0.3, 0.6, 1.0), 0.0), unique_tokens=frame["D"] / one_of(1.0, 4.0, 16.0, 40.0),
        N_mean=frame["N"] * one_of(0.7, 0.8, 1.0), optimizer=one_of("Muon", "AdamW"),
    )  # fmt: skip
    frame["fprop.w"], frame["dgrad.dy"] = np.where(w, "mxfp4", "bf16"), np.where(a, "mxfp4", "bf16")
    return RunTable(frame)


def truth(law: LawFile, columns: dict, rng: np.random.Generator) -> dict[str, float]:
    """Pivoted parameters anywhere within the start grid, not on it."""
    found = {}
    for i, p in enumerate(law.parameters(columns)):
        if p.fixed is not None:
            found[p.name] = p.fixed
        elif p.start and not p.linear:
            low, high = (0.15, 0.6) if p.name in ("alpha", "beta") else (min(p.start) * 0.9, max(p.start) * 1.1)
            found[p.name] = rng.uniform(low, high)
        else:
            found[p.name] = 1.5 if p.name == "E" else 0.2 + 0.05 * i
    return found


@pytest.mark.parametrize("name", POINTS)
def test_a_fit_finds_the_coefficients_that_the_runs_were_drawn_from(name):
    seed = FILES.index(name)
    law, table = load_law(name), ladder(name, seed)
    columns = table.columns((*law.law.needs, *(("bits_kv",) if name.startswith("kumar") else ())))
    pivots = pivots_of(law.law, columns)
    columns = {k: v / pivots[k] if k in pivots else v for k, v in columns.items()}
    theta = truth(law, columns, np.random.default_rng(seed))
    response = law.law.loss(theta, law.law.prepare(columns))
    noise = np.random.default_rng(1).normal(0, NOISE, len(table))
    response = response * np.exp(noise) if law.law.log_residuals else response + noise
    fitted = fit(law, RunTable(table.frame.assign(**{law.law.response: response})), restarts=0)
    assert fitted.rmse < 1.3 * NOISE  # of 64 runs: 1 +- .09, less for the fitted parameters
    assert fitted.at_bound == ()
    for key, value in theta.items():
        assert fitted.pivoted[key] == pytest.approx(value, rel=0.02, abs=2e-3), key
