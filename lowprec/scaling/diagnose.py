"""judge: should anybody act on this fit? OK, WEAK or REFUSE, with the reasons in sentences.

A fit always returns numbers. Most wrong conclusions from scaling laws were visible in the table before anything was
fitted: all runs at 20 tokens a parameter (N and D are then one variable, arXiv:2605.08541), losses that rise with size
because every run was far too short, four points for three parameters, BF16 and FP4 runs under one curve.

    REFUSE   the parameters mean nothing, or the law is not one of these runs: do not predict with it
    WEAK     it may serve inside the range of the runs; some parameter or extrapolation is not supported by them
    OK       none of this was found, which does not prove the law: `compare` tests it where it was not fitted

The thresholds are constants with their reasons. Those of influence were set so that of well-spread ladders and iso-FLOP
grids drawn from a law with noise (160 tables of 16 to 87 runs) more than nine in ten are OK.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from lowprec.scaling.descend import descend
from lowprec.scaling.fit import Fit, outliers
from lowprec.scaling.law import Array
from lowprec.scaling.uncertainty import Bootstrap, bootstrap, clusters

SPARE_SETTINGS = 2  # settings beyond the number of parameters: with fewer, residuals say nothing about errors
COLLINEAR = 1.25  # D/N spans less: what a doubling of N costs cannot be told from what a doubling of D brings
CONDITION_REFUSE = 1e4  # of the scaled Jacobian: a loss that is off by 0.1 % moves some parameter by a factor
CONDITION_WEAK = 300  # 25 runs with .3 % noise and a condition of 300 err by 5 % far outside; with one of 60, by .7 %
SPAN_WEAK: Mapping[str, float] = {"N": 8, "D": 8, "D/N": 4}  # with half of these, the same runs err twice as much
RISING_REFUSE, RISING_WEAK = 0.25, 0.1  # share of pairs of runs of equal D in which the larger model is worse
RISING = 0.002  # relative: smaller rises are noise (repeats of a run differ by about 0.0002)
SAME_D, LARGER, MUCH_LARGER = 1.1, 1.25, 2.0  # a pair has D within this factor, and N apart by this one
PAIRS = 5  # with fewer, the slope of the loss on log N at given D is looked at instead
MOST_ROWS = 1000  # that are compared in pairs
SURE = 3.0  # standard errors
UNDERTRAINED = 1.0  # tokens a parameter: published laws begin above it
MISFIT = 0.03  # root mean square of relative residuals: laws of finished runs reach .002 to .01
REACHED = 0.5  # of the restarts
WIDE = 1.0  # width of a 95 % interval over the estimate, in pivoted coordinates
OUTLIER_SHARE = 0.1  # of the runs: 0.07 % lie 5 MAD out under Gaussian noise, a few percent in published tables
HIGHEST = 0.02  # share of the runs, at least one, whose highest losses are left out to see what they do
MOVED = 1.4  # standard errors that a shape parameter moves when those, or the outliers, are left out
MOVED_BY_ONE = 2.0, 0.7  # ... when a single run is; when that run is an outlier of the curve fitted without it
LOST_DRAWS = 0.5  # share of bootstrap draws that do not determine the parameters
QUICK = 60  # refits for standard errors, if the caller brings no bootstrap
# columns that say how large a run was or where it stood, but not how it was made
SIZES = ("N", "D", "C", "N_total", "N_mean", "unique_tokens", "step", "lr", "curve", "history")
# what runs can differ in without the law's knowing, and a law that knows it
LABELS = {"precision": "efficiency", "data": "", "optimizer": "optimizer_efficiency", "schedule": ""}

Reasons = Iterator[tuple[str, str]]  # grade, sentence


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`grade` is "OK", "WEAK" or "REFUSE"; `reasons` are sentences, the gravest first. str() is "WEAK: why; why"."""

    grade: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.grade + (": " + "; ".join(self.reasons) if self.reasons else "")


def judge(fitted: Fit, boot: Bootstrap | None = None) -> Verdict:
    """The verdict on a fit. Without `boot`, a quick bootstrap gives the standard errors that some reasons need."""
    found = [*_numbers(fitted), *_spread(fitted), *_rising(fitted), *_mixtures(fitted), *_optimum(fitted)]
    if not any(grade == "REFUSE" for grade, _ in found) and fitted.free:
        points = "history" in fitted.law.law.needs  # of whole curves, which belong together
        boot = boot or bootstrap(fitted, QUICK, cluster="run" if points else "cell")
        found += [*_intervals(fitted, boot), *_influence(fitted, boot)]
    grades = [grade for grade in ("REFUSE", "WEAK") if any(grade == g for g, _ in found)]
    return Verdict(grades[0] if grades else "OK", tuple(why for g in grades for grade, why in found if grade == g))


def refuse(why: str) -> tuple[str, str]:
    return "REFUSE", why


def weak(why: str) -> tuple[str, str]:
    return "WEAK", why


def exponents(fitted: Fit, column: str) -> tuple[str, ...]:
    """Free parameters that are exponents of a column: those that some coefficient's unit names."""
    named = {p.unit[column].removeprefix("-") for p in fitted.problem.params if column in p.unit}
    return tuple(name for name in fitted.free if name in named)


def _numbers(fitted: Fit) -> Reasons:
    """Are there enough runs, and did the optimiser return a number?"""
    frame, needed = fitted.table.frame, len(fitted.free) + SPARE_SETTINGS
    settings = len(frame[list(fitted.law.law.needs)].drop_duplicates())
    if settings < needed:
        yield refuse(
            f"{settings} different settings ({len(frame)} runs) cannot determine {len(fitted.free)} parameters and "
            f"their errors: train at least {needed}, or hold some parameters fixed"
        )
    if not np.isfinite([fitted.objective, *fitted.params.values()]).all():
        yield refuse("the optimum is not finite: the law does not describe these runs")


def _spread(fitted: Fit) -> Reasons:
    """Do the runs vary what the law is about?"""
    free: dict[str, bool] = {column: bool(exponents(fitted, column)) for column in ("N", "D")}
    free["D/N"] = free["N"] and free["D"]
    collinear = free["D/N"] and fitted.spans.get("D/N", np.inf) < COLLINEAR
    if collinear:
        ratio = float(np.median(fitted.table.column("D") / fitted.table.column("N")))
        yield refuse(
            f"all runs have about {ratio:.3g} tokens a parameter, so N and D are one variable and their exponents "
            f"cannot be told apart: add runs of the same sizes with {ratio / 4:.3g} and {ratio * 4:.3g}"
        )
    elif fitted.condition > CONDITION_REFUSE and len(fitted.residuals) >= len(fitted.free):
        yield refuse(f"{_inseparable(fitted)} cannot be told apart on these runs (condition {fitted.condition:.0e})")
    elif fitted.condition > CONDITION_WEAK:
        yield weak(f"{_inseparable(fitted)} are hard to tell apart on these runs (condition {fitted.condition:.0f})")
    else:
        yield from _hanging(fitted)
    for column, least in SPAN_WEAK.items():
        span = fitted.spans.get(column, np.inf)
        if free[column] and round(span, 1) < least and not (column == "D/N" and collinear):
            yield weak(f"{column} spans a factor of {span:.3g} only; an exponent wants {least:g}")


def _hanging(fitted: Fit) -> Reasons:
    """Is there one setting without which the parameters cannot be told apart?"""
    scaled, _ = _scaled_jacobian(fitted)
    groups = clusters(fitted.table, "cell")
    inverse = np.linalg.pinv(scaled.T @ scaled, hermitian=True)
    leverage = np.bincount(groups, np.einsum("np,pq,nq->n", scaled, inverse, scaled))
    rest = scaled[groups != np.argmax(leverage)]
    if len(rest) >= scaled.shape[1] > 0 and np.linalg.cond(rest) > CONDITION_REFUSE:
        run = fitted.table.frame.iloc[int(np.argmax(groups == np.argmax(leverage)))].get("run", "one setting")
        yield refuse(f"without {run} {_inseparable(fitted)} could not be told apart on these runs: it alone decides")


def _inseparable(fitted: Fit) -> str:
    """The parameters in the direction that the runs see least, by name."""
    scaled, lengths = _scaled_jacobian(fitted)
    if still := [name for name, length in zip(fitted.free, lengths) if not length > 1e-300]:
        return f"{still[0]} changes nothing and the other parameters"
    direction = np.abs(np.linalg.svd(scaled)[2][-1])
    names = [fitted.free[i] for i in np.argsort(-direction)[: max(2, int(np.sum(direction > 0.3)))]]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _scaled_jacobian(fitted: Fit) -> tuple[Array, Array]:
    """The Jacobian (n, p) with columns of length 1, and the lengths (p,)."""
    jacobian = fitted.problem.linearize(fitted.x[None])[1][0]
    lengths = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    return jacobian / lengths, lengths


def _rising(fitted: Fit) -> Reasons:
    """The loss falls with N at given D, or the runs were too short or badly tuned and no scaling law describes them."""
    if "D/N" not in fitted.spans or fitted.law.law.response != "loss":
        return
    rows = np.unique(np.linspace(0, len(fitted.table) - 1, MOST_ROWS).astype(int))
    table = fitted.table.frame.iloc[rows]
    N, D = (np.log(table[name].to_numpy(np.float64)) for name in ("N", "D"))
    loss = np.log(fitted.problem.response[rows])
    made = [c for c in dict.fromkeys((*fitted.law.law.needs, *LABELS)) if c in table and c not in SIZES]
    kind = table.groupby(made, dropna=False).ngroup().to_numpy() if made else np.zeros(len(rows), dtype=int)
    near = np.abs(D[:, None] - D) < np.log(SAME_D)
    small, large = np.nonzero(near & (kind[:, None] == kind) & (N - N[:, None] > np.log(LARGER)))
    if len(small) < PAIRS:  # every size has labels of its own: pairs of any, farther apart than labels bring a loss
        small, large = np.nonzero(near & (N - N[:, None] > np.log(MUCH_LARGER)))
    why = "the larger models were trained for too short or are badly tuned, and no scaling law describes that"
    if len(small) >= PAIRS:
        share = float(np.mean(loss[large] - loss[small] > RISING))
        if share > RISING_WEAK:
            grade = refuse if share > RISING_REFUSE else weak
            yield grade(f"the loss rises with N at equal D in {share:.0%} of {len(small)} pairs of runs: {why}")
    elif fitted.spans["D/N"] >= COLLINEAR:
        slope, error = _slope(loss, N, np.stack([np.ones_like(D), D, D**2], axis=1))
        if slope > SURE * error:
            yield refuse(f"at given D the loss rises with N, by {slope * np.log(2):.1%} a doubling: {why}")
    if (share := float(np.mean(np.log(UNDERTRAINED) > D - N))) > 0.5:
        yield weak(
            f"{share:.0%} of the runs saw fewer tokens than they have parameters, where no published law was fitted"
        )


def _slope(y: Array, x: Array, others: Array) -> tuple[float, float]:
    """Coefficient of x in a regression of y on x and `others` (n, k), and its standard error; (0, inf) for none."""
    x = x - others @ np.linalg.lstsq(others, x, rcond=None)[0]
    y = y - others @ np.linalg.lstsq(others, y, rcond=None)[0]
    spare = len(y) - others.shape[1] - 1
    if spare < 1 or x @ x < 1e-9:
        return 0.0, np.inf
    slope = float(x @ y / (x @ x))
    return slope, float(np.sqrt(np.sum((y - slope * x) ** 2) / spare / (x @ x)))


def _mixtures(fitted: Fit) -> Reasons:
    """Runs that differ in something that the columns of the law do not tell."""
    frame, law = fitted.table.frame, fitted.law
    made = [name for name in law.law.needs if name not in SIZES]
    unquantised = {str(name).lower() for name in getattr(law.law, "reference", ())}
    if "precision" in made and unquantised and not unquantised & set(frame["precision"].str.lower()):
        yield refuse(
            "no run is in bf16 or another precision that quantises nothing, so what the others cost cannot be "
            "measured: add some, or say what to compare with by --option reference=LABEL"
        )
    for column, remedy in LABELS.items():
        told = column in made or (column == "schedule" and "history" in law.law.needs)
        if told or column not in frame or frame[column].nunique(dropna=False) < 2:
            continue
        if made and frame.groupby(made, dropna=False)[column].nunique().max() == 1:
            continue  # the law knows it by other columns: bits, block sizes
        labels = frame[column].fillna("no label").astype(str).to_numpy()
        names = sorted(set(labels))
        apart = {name: _apart(fitted.residuals, labels == name) for name in names}
        worst = max(names, key=lambda name: abs(apart[name]))
        fix = f"fit one {column} alone" + f", or use a law that knows it such as {remedy}" * bool(remedy)
        unknown = refuse if column == "precision" and not made else weak
        if abs(apart[worst]) > SURE:
            off = -float(fitted.residuals[labels == worst].mean())
            size = f"{abs(off):.2%}" if law.law.log_residuals else f"{abs(off):.2g}"
            yield unknown(
                f"law {law.name} cannot tell the {column} of these runs, and those with {worst} lie {size} "
                f"{'above' if off > 0 else 'below'} its curve: {fix}"
            )
        elif column == "precision":
            yield weak(f"law {law.name} cannot tell the precisions of these runs ({_some(names)}) apart: {fix}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _apart(residuals: Array, mask: Array) -> float:
    """Difference of the mean residuals inside and outside `mask`, in standard errors."""
    one, two = residuals[mask], residuals[~mask]
    if len(one) + len(two) < 3:
        return 0.0
    pooled = (np.sum((one - one.mean()) ** 2) + np.sum((two - two.mean()) ** 2)) / (len(one) + len(two) - 2)
    return float((one.mean() - two.mean()) / max(np.sqrt(pooled * (1 / len(one) + 1 / len(two))), 1e-9))


def _optimum(fitted: Fit) -> Reasons:
    """What the optimiser ended on."""
    for name in fitted.at_bound:
        value = fitted.pivoted[name]
        if name == "E" and value < 0.5 * fitted.problem.response.min():
            yield weak(
                "E ended on its bound 0: the runs do not show where the loss levels off, so do not extrapolate far"
            )
        else:
            yield weak(f"{name} ended on its bound ({value:.3g}): the runs do not determine it")
    if fitted.reached < REACHED:
        yield weak(f"only {fitted.reached:.0%} of the restarts ended at the best optimum: there may be a better one")
    if fitted.law.law.log_residuals and fitted.rmse > MISFIT:
        yield weak(f"the runs scatter by {fitted.rmse:.1%} about the curve: the law does not describe them")


def _intervals(fitted: Fit, boot: Bootstrap) -> Reasons:
    draws = len(boot.x) + boot.failed + boot.redrawn
    if boot.failed + boot.redrawn > LOST_DRAWS * draws:
        share = (boot.failed + boot.redrawn) / draws
        yield weak(f"{share:.0%} of the resamples do not determine the parameters: there are too few different (N, D)")
    for name, (low, high) in (boot.intervals(pivoted=True) if len(boot.x) else {}).items():
        value = fitted.pivoted[name]
        if name not in fitted.at_bound and high - low > WIDE * abs(value):
            yield weak(f"the 95 % interval of {name}, {low:.3g} to {high:.3g}, is wider than its value {value:.3g}")


def _influence(fitted: Fit, boot: Bootstrap) -> Reasons:
    """Would somebody with a few runs fewer have drawn another conclusion?"""
    shapes = [i for i, p in enumerate(fitted.problem.free) if not p.linear]
    if not shapes or len(boot.x) < 2:
        return
    count, names = len(fitted.residuals), [fitted.free[i] for i in shapes]
    runs = fitted.table.frame["run"].astype(str).to_numpy() if "run" in fitted.table else np.arange(count).astype(str)
    highest = np.argsort(-fitted.problem.response)[: max(1, round(HIGHEST * count))]
    alone = [np.array([i]) for i in _influential(fitted)]
    left_out = [highest, outliers(fitted.residuals, len(fitted.free)), *alone]
    weights = np.ones((len(left_out), count))
    for row, some in zip(weights, left_out):
        row[some] = 0.0
    x, _ = descend(fitted.problem, np.repeat(fitted.x[None], len(left_out), axis=0), fitted.delta, weights)
    errors = np.maximum(boot.x[:, shapes].std(axis=0), 1e-12)
    moved = np.abs(x[:, shapes] - fitted.x[shapes]) / errors
    by, what = moved.max(axis=1), [f"{names[i]} moves by {m.max():.1f} standard errors" for i, m in _worst(moved)]
    if by[0] > MOVED:
        yield weak(f"without the {len(highest)} of highest loss {what[0]}: find out why, or drop them and say so")
    if len(left_out[1]) > OUTLIER_SHARE * count or (len(left_out[1]) and by[1] > MOVED):
        listed = ", ".join(runs[left_out[1]][:8]) + " ..." * (len(left_out[1]) > 8)
        yield weak(
            f"{len(left_out[1])} of {count} runs lie more than 5 MAD off the curve ({listed}): without them {what[1]}"
        )
    for (run,), optimum, size, sentence in zip(alone, x[2:], by[2:], what[2:]):
        if size > MOVED_BY_ONE[run in outliers(fitted.problem.residuals(optimum), len(fitted.free))]:
            yield weak(f"without the run {runs[run]} {sentence}")


def _worst(moved: Array) -> list[tuple[int, Array]]:
    return [(int(np.argmax(row)), row) for row in moved]


def _influential(fitted: Fit) -> list[int]:
    """The runs with the largest one-step influence on some parameter, at most one a parameter."""
    scaled, _ = _scaled_jacobian(fitted)
    inverse = np.linalg.pinv(scaled.T @ scaled, hermitian=True)
    leverage = np.clip(np.einsum("np,pq,nq->n", scaled, inverse, scaled), 0, 0.99)
    psi = np.clip(fitted.residuals, -fitted.delta, fitted.delta) / (1 - leverage)
    return sorted({int(i) for i in np.argmax(np.abs((scaled * psi[:, None]) @ inverse), axis=0)})
