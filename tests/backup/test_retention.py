"""Which backups are kept, as a function of their marks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from server.backup.retention import Retention, outdated

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
POLICY = Retention(all_days=30, weekly_days=90)
NIGHTLY = {f"{days}": NOW - timedelta(days=days) for days in range(200)}


def kept(marks: dict[str, datetime], now: datetime = NOW) -> set[int]:
    return {int(name) for name in marks.keys() - outdated(marks, POLICY, now)}


def test_every_backup_is_kept_for_a_month_and_one_a_week_for_three() -> None:
    left = kept(NIGHTLY)
    assert set(range(31)) <= left
    older = sorted(left - set(range(31)))
    assert [NIGHTLY[str(days)].isocalendar().weekday for days in older] == [1] * len(older)
    assert older == [35, 42, 49, 56, 63, 70, 77, 84]


def test_nights_that_go_by_one_by_one_keep_the_same() -> None:
    marks: dict[str, datetime] = {}
    for days in reversed(range(200)):
        marks[str(days)] = NIGHTLY[str(days)]
        for name in outdated(marks, POLICY, marks[str(days)]):
            del marks[name]
    assert {int(name) for name in marks} == kept(NIGHTLY)


def test_the_newest_are_kept_however_old() -> None:
    assert kept({"500": NOW - timedelta(days=500), "400": NOW - timedelta(days=400)}) == {400, 500}
    assert outdated({}, POLICY, NOW) == set()


@given(st.dictionaries(st.text(), st.timedeltas(timedelta(), timedelta(days=500))))
def test_no_backup_of_the_last_month_goes_and_none_of_long_ago_stays(
    ages: dict[str, timedelta],
) -> None:
    marks = {name: NOW - age for name, age in ages.items()}
    gone = outdated(marks, POLICY, NOW)
    newest = sorted(marks, key=lambda name: marks[name])[-2:]
    assert not [name for name in gone if ages[name] <= timedelta(days=30)]
    assert not [name for name in marks.keys() - gone - {*newest} if ages[name].days >= 91]
