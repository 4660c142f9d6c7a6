"""The checker itself: a judge that cannot find a fault proves nothing."""

from collections import Counter
from dataclasses import replace
from uuid import UUID

import pytest

from server import ids
from tests.faults.checker import Stored, judge
from tests.faults.history import History, Op, Outcome

USER = UUID(int=1)
MEMORY = ids.show(ids.MEMORY, UUID(int=2))
ANOTHER = ids.show(ids.MEMORY, UUID(int=3))
CREATED = Op(
    *("create", ids.show(ids.USER, USER), "key", ("text",), 0.0, 1.0, 3.0, Outcome.OK, "OK", MEMORY)
)
UNKNOWN = replace(CREATED, outcome=Outcome.INFO, code="UNAVAILABLE", answer="")
SOUND = Stored(
    [((USER, "text"), MEMORY, 0)],
    {(USER, "key"): MEMORY},
    Counter({("memory.create", MEMORY): 1}),
)
NOTHING = Stored([], {}, Counter())


def problems(stored: Stored, *ops: Op) -> set[str]:
    return set(judge(History(list(ops)), stored).problems)


def test_sound_history_has_no_problems() -> None:
    assert problems(SOUND, UNKNOWN, CREATED) == set()


@pytest.mark.parametrize(
    ("stored", "ops", "found"),
    [
        (NOTHING, (CREATED,), {"lost"}),
        (SOUND, (), {"invented"}),
        (SOUND, (UNKNOWN,), {"unresolved"}),
        (SOUND, (CREATED, replace(CREATED, answer=ANOTHER)), {"duplicated", "lost"}),
        (SOUND, (replace(CREATED, end=4.5),), {"overdue"}),
        (replace(SOUND, memories=[((USER, "text"), MEMORY, 1)]), (CREATED,), {"duplicated"}),
        (replace(SOUND, requests={(USER, "key"): ANOTHER}), (CREATED,), {"invented"}),
        (replace(SOUND, events=Counter()), (CREATED,), {"lost"}),
        (
            replace(SOUND, events=Counter({("memory.create", MEMORY): 2})),
            (CREATED,),
            {"duplicated"},
        ),
        (
            replace(SOUND, events=SOUND.events + Counter({("memory.create", ANOTHER): 1})),
            (CREATED,),
            {"invented"},
        ),
    ],
    ids=[
        "acknowledged and not stored",
        "stored and never asked for",
        "never known",
        "two answers to one request",
        "past its deadline",
        "counted as seen by its retry",
        "request stands for another",
        "not audited",
        "audited twice",
        "audited and not stored",
    ],
)
def test_every_fault_is_found(stored: Stored, ops: tuple[Op, ...], found: set[str]) -> None:
    assert problems(stored, *ops) == found
