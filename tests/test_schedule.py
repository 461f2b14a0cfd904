"""A schedule says when, and how many: ramps, cosines, and numbers that make no sense."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from neural_plasticity.errors import InvalidArgument
from neural_plasticity.regrowth import PlasticitySchedule


@given(some.integers(1, 400), some.integers(1, 60), some.floats(0, 1), some.floats(0, 1), some.floats(0, 0.9), some.floats(0, 1))
def test_the_ramp_rises_to_its_end_and_stays(total, every, a, b, before, end):
    schedule = PlasticitySchedule(prune_to=end, prune_every=every, prune_from=min(a, b), prune_until=max(a, b))
    first, last = schedule.ramp(total)
    steps = [step for step in range(total + 1) if schedule.prunes(step, total)]
    assert all(max(1, first) <= step <= last and ((step - first) % every == 0 or step == last) for step in steps) and (last > total or steps[-1] == last)
    levels = [schedule.level(step, total, before) for step in steps]
    assert levels == sorted(levels, reverse=end < before) and (last > total or levels[-1] == end)


def test_the_ramp_is_the_cubic_of_zhu_and_gupta():
    schedule = PlasticitySchedule(prune_to=0.8, prune_from=0.2, prune_until=0.6)
    assert schedule.ramp(100) == (20, 60)
    assert schedule.level(40, 100, before=0.2) == pytest.approx(0.8 + (0.2 - 0.8) * 0.5**3)
    assert schedule.level(20, 100, 0.2) == pytest.approx(0.2) and schedule.level(60, 100, 0.2) == 0.8


def test_counts_follow_a_cosine_and_end():
    schedule = PlasticitySchedule(regrow_every=10, fraction=0.5, stop_after=0.5)
    assert [schedule.count(step, 100, 40) for step in (0, 5, 10, 25, 50, 60)] == [0, 0, math.ceil(20 * (1 + math.cos(math.pi / 5)) / 2), 0, 0, 0]
    assert schedule.count(20, 100, dormant=0) == 0


def test_without_a_level_nothing_is_pruned():
    assert not any(PlasticitySchedule().prunes(step, 100) for step in range(101))


@pytest.mark.parametrize("wrong", [dict(regrow_every=0), dict(regrow_every=2.5), dict(fraction=1.5), dict(fraction=-0.1), dict(stop_after=2), dict(confidence=-1), dict(warmup_steps=-1),
                                   dict(num_batches=0), dict(verify_batches=-1), dict(verify_batches=True), dict(cooldown=-5), dict(prune_to=40), dict(prune_every=0), dict(hysteresis="2"),
                                   dict(prune_to=0.5, prune_from=0.6, prune_until=0.5), dict(swap_by="size"), dict(on_rise="panic"), dict(max_perplexity_rise=-0.1), dict(fraction=math.nan)])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong)) if len(wrong) == 1 else "prune_from"):
        PlasticitySchedule(**wrong)
