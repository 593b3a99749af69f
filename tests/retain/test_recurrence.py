from __future__ import annotations

import warnings

import numpy as np
import pytest

from palimpsest.core.errors import InvalidStream
from palimpsest.retain.recurrence import BUDGETED, LAWS, PUBLISHED, Recurrence, counts, free_power, recurring
from palimpsest.retain.short_form import parse_stream


@pytest.mark.parametrize("law", LAWS)
def test_no_task_comes_before_its_time_and_the_new_one_comes_whole(law):
    table = counts(6, 1200, Recurrence(law, 0.5))
    assert (np.tril(table, -1) == 0).all() and (np.diag(table) == 1200).all()


@pytest.mark.parametrize("law", BUDGETED)
@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_a_budget_is_never_exceeded_and_nearly_used(law, fraction):
    table = counts(6, 1200, Recurrence(law, fraction))
    old = table.sum(0)[1:] - 1200
    assert (old <= 1200 * fraction).all()
    assert (old >= 1200 * fraction - 10).all()


@pytest.mark.parametrize("law", ["exponential", "power", "lag-power", "free-power"])
def test_more_recent_tasks_come_back_more(law):
    table = counts(6, 1200, Recurrence(law, 0.5))
    for step in range(2, 6):
        assert (np.diff(table[:step, step]) >= 0).all() and table[step - 1, step] > table[0, step]


def test_a_lag_power_law_falls_as_a_power_of_the_lag():
    table = counts(5, 10**6, Recurrence("lag-power", 1.0, offset=1.0, exponent=2.0))
    share = table[:4, 4] / table[3, 4]
    np.testing.assert_allclose(share, [(lag + 1) ** -2.0 / 2**-2.0 for lag in (4, 3, 2, 1)], atol=1e-4)


def test_the_published_counts_are_the_law_to_one_record():
    assert max(abs(free_power(lag) - count) for lag, count in enumerate(PUBLISHED)) < 1
    long = counts(14, PUBLISHED[0], Recurrence("free-power"))
    assert (np.diff(long[:, 13]) > 0).all() and long[0, 13] == int(free_power(13))


def test_a_recurring_stream_holds_the_counted_records_each_once(digits):
    base = parse_stream("domain:permuted:4", digits)
    stream = recurring(base, Recurrence("uniform", 0.3), seed=1)
    table = counts(4, len(base[0].records), Recurrence("uniform", 0.3))
    for experience in stream:
        names = experience.records.ids
        assert len(set(names)) == len(names)
        tasks = np.array([int(name.split("@")[1]) for name in names])
        assert np.bincount(tasks, minlength=4).tolist() == table[:, experience.index].tolist()
        assert set(names) <= {name for earlier in base for name in earlier.records.ids}
        assert experience.test.ids == base[experience.index].test.ids


def test_recurrence_of_classes_brings_old_classes_back(digits):
    stream = parse_stream("power-law:5x2@0.25", digits)
    assert stream.returning and stream.scenario == "class"
    assert stream[4].classes == tuple(range(10))
    assert set(stream[4].test.column("label")) == {8, 9}


def test_a_budget_too_small_for_all_tasks_is_warned_of(digits):
    base = parse_stream("domain:permuted:4", digits)
    with pytest.warns(UserWarning, match="do not come back"):
        recurring(base, Recurrence("uniform", 0.001))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recurring(base, Recurrence("uniform", 0.5))


@pytest.mark.parametrize(
    "settings",
    [{"law": "linear"}, {"fraction": 0.0}, {"fraction": 1.5}, {"a": 2.0}, {"b": 0.0}, {"offset": -1.0}],
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(InvalidStream):
        Recurrence(**settings)
    with pytest.raises(InvalidStream):
        counts(1, 100, Recurrence())
