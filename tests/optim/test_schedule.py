"""Learning rates: exact values at the corners, monotone pieces, and mistakes named."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import lowprec
from lowprec.optim import Decay, ScheduleConfig, Shape, learning_rate, phases

RECIPES = sorted((Path(lowprec.__file__).parent / "recipes" / "schedule").glob("*.yaml"))
PEAK = 3e-4

schedules = st.builds(
    ScheduleConfig,
    shape=st.sampled_from(Shape),
    warmup_steps=st.none(),
    warmup_frac=st.floats(0, 0.4),
    final_frac=st.floats(0, 1),
    decay_frac=st.floats(0, 0.5),
    decay_shape=st.sampled_from(Decay),
)


def rates(schedule, total):
    return [learning_rate(step, total, schedule, PEAK) for step in range(total)]


@pytest.mark.parametrize("shape", list(Shape))
def test_warmup_is_a_line_that_ends_at_the_peak(shape):
    """With 10 warmup steps: step 0 has a tenth, step 4 half, and step 9 is the first at exactly the peak."""
    lr = rates(ScheduleConfig(shape=shape, warmup_steps=10), 100)
    assert lr[0] == PEAK / 10
    assert lr[4] == PEAK / 2
    assert lr[9] == PEAK and max(lr) == PEAK
    assert lr[:10] == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)])


def test_cosine_corners():
    """No warmup: half-way is the mean of peak and final; the last step is exactly final."""
    lr = rates(ScheduleConfig(shape=Shape.cosine, final_frac=0.1), 100)
    assert lr[49] == pytest.approx(PEAK * 0.55)
    assert lr[24] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert lr[99] == PEAK * 0.1


def test_linear_corners():
    """Equal steps down from the warmup's end to exactly final."""
    lr = rates(ScheduleConfig(shape=Shape.linear, warmup_steps=20, final_frac=0.0), 100)
    assert lr[19] == PEAK and lr[99] == 0.0
    assert lr[59] == pytest.approx(PEAK / 2)


@pytest.mark.parametrize(
    ("decay", "quarter", "half"), [(Decay.linear, 0.75, 0.5), (Decay.one_minus_sqrt, 0.5, 1 - math.sqrt(0.5))]
)
def test_wsd_corners(decay, quarter, half):
    """Peak up to the decay's start, then the shape over the last 20 %, ending at exactly final."""
    lr = rates(ScheduleConfig(shape=Shape.wsd, warmup_steps=5, final_frac=0.01, decay_frac=0.2, decay_shape=decay), 100)
    assert lr[4:80] == [PEAK] * 76
    assert lr[80] < PEAK
    assert lr[84] == pytest.approx(PEAK * (0.01 + 0.99 * quarter))
    assert lr[89] == pytest.approx(PEAK * (0.01 + 0.99 * half))
    assert lr[99] == PEAK * 0.01


def test_constant_stays():
    """After the warmup, the peak to the end, whatever final_frac."""
    assert rates(ScheduleConfig(shape=Shape.constant, warmup_steps=2), 9)[1:] == [PEAK] * 8


def test_published_12b_schedule():
    """arXiv:2509.25149: 4.5e-4 to 4.5e-6 over the last 20 % of 1,658,564 steps."""
    schedule = ScheduleConfig(final_frac=0.01, decay_frac=0.2)
    assert phases(1_658_564, schedule) == (0, 331_713)
    assert learning_rate(1_658_564 - 331_713 - 1, 1_658_564, schedule, 4.5e-4) == 4.5e-4
    assert learning_rate(1_658_563, 1_658_564, schedule, 4.5e-4) == pytest.approx(4.5e-6, rel=1e-12)


@given(schedule=schedules, total=st.integers(1, 300))
def test_pieces_are_monotone_and_bounded(schedule, total):
    """Strictly up through the warmup, never up after it, between 0 and the peak; the last step is the final one."""
    lr, (warmup, decay) = rates(schedule, total), phases(total, schedule)
    assert all(0 <= value <= PEAK for value in lr)
    assert all(a < b for a, b in pairwise(lr[:warmup]))
    assert all(a >= b for a, b in zip(lr[max(warmup - 1, 0) :], lr[max(warmup, 1) :]))
    assert lr[max(warmup - 1, 0) : total - decay] == [PEAK] * (total - decay - max(warmup - 1, 0))
    assert learning_rate(total + 5, total, schedule, PEAK) == lr[-1]
    if decay:
        assert lr[-1] == PEAK * schedule.final_frac


@given(schedule=schedules, total=st.integers(10, 300))
def test_no_jump_between_pieces(schedule, total):
    """Neighbouring steps differ by at most the steepest piece's slope (the square root's first step is the largest)."""
    lr, (warmup, decay) = rates(schedule, total), phases(total, schedule)
    steepest = max(
        1 / max(warmup, 1), (math.pi / 2 / decay if schedule.shape is Shape.cosine else decay**-0.5) if decay else 0
    )
    if warmup:
        assert max(abs(a - b) for a, b in pairwise(lr)) <= PEAK * steepest * (1 + 1e-9)


def test_a_fraction_and_its_steps_agree():
    """warmup_frac 0.1 of 50 steps is warmup_steps 5."""
    assert rates(ScheduleConfig(warmup_frac=0.1), 50) == rates(ScheduleConfig(warmup_steps=5), 50)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"warmup_steps": 3, "warmup_frac": 0.1}, "both given: set one of them to null"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_frac": 1.5}, "warmup_frac is 1.5: it must lie between 0 and 1"),
        ({"final_frac": -0.1}, "final_frac is -0.1"),
        ({"shape": "cosin"}, r"shape is 'cosin': it must be one of \['constant', 'linear', 'cosine', 'wsd'\]"),
        ({"decay_shape": "sqrt"}, "decay_shape is 'sqrt'"),
    ],
)
def test_mistakes_are_named(arguments, words):
    """Each impossible setting raises one sentence with the valid ones."""
    with pytest.raises(ValueError, match=words):
        ScheduleConfig(**arguments)


def test_phases_that_do_not_fit_are_named():
    """Warmup and decay longer than the run, and steps outside it, raise one sentence."""
    with pytest.raises(ValueError, match="90 warmup steps and 20 decay steps do not fit into 100"):
        learning_rate(0, 100, ScheduleConfig(warmup_steps=90), PEAK)
    with pytest.raises(ValueError, match="200 warmup steps and 0 decay steps do not fit into 100"):
        learning_rate(0, 100, ScheduleConfig(shape=Shape.cosine, warmup_steps=200), PEAK)
    with pytest.raises(ValueError, match="step -1 of 100"):
        learning_rate(-1, 100, ScheduleConfig(), PEAK)


def test_every_recipe_is_valid_and_complete():
    """Each YAML names every field, comments each key, and is the shape of its name."""
    assert {path.stem for path in RECIPES} == {shape.value for shape in Shape}
    for path in RECIPES:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScheduleConfig), OmegaConf.load(path)))
        assert config.shape.value == path.stem
        assert set(OmegaConf.load(path)) == set(ScheduleConfig.__dataclass_fields__)
        assert all("#" in line for line in path.read_text().splitlines())
        assert learning_rate(999, 1000, config, PEAK) == (PEAK if path.stem == "constant" else PEAK * config.final_frac)
