"""python -m bench.ideas: what each idea of ranking gives, on questions that chose nothing too."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import typer

from bench import conversations
from bench.conversations import DataError
from bench.offline import Setting, Told, judged
from bench.progress import notices, step
from bench.table import markdown
from server.memory.fusion import Weights

Recalls = Sequence[npt.NDArray[np.float64]]
"""recall@10 of every question, a conversation at a time."""

_HEAD: Final = ("idea", "best", "recall@10", "held out", "gain held out")
_USUAL: Final = Setting()
_SHARES: Final = (0.05, 0.1, 0.15, 0.2, 0.3)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Idea:
    """Something to do otherwise than the service does, in one setting or a choice of them."""

    name: str
    settings: Mapping[str, Setting]
    by_words: bool = True
    """Whether it says something about words alone; all do about words and vectors."""


def _one(name: str, **changed: Any) -> Idea:
    return Idea(name, {"": replace(_USUAL, **changed)})


def _of_vectors(name: str, **changed: Any) -> Idea:
    return replace(_one(name, **changed), by_words=False)


def _choice(name: str, what: str, values: Iterable[Any], **changed: Any) -> Idea:
    return Idea(name, {f"{one:g}": replace(_USUAL, **{what: one}, **changed) for one in values})


def _weight(name: str, what: str, values: Iterable[Any], **changed: Any) -> Idea:
    """Return a choice of what a weight of the service is."""
    weights = {f"{one:g}": replace(Weights(), **{what: one}) for one in values}
    return Idea(
        name, {label: replace(_USUAL, weights=one, **changed) for label, one in weights.items()}
    )


IDEAS: Final = (
    _one("as the service ranks"),
    _one("own words only", around_words=(1,)),
    _one("neighbours ±1", around_words=(2, 1)),
    _one("neighbours ±3, halving", around_words=(2, 1, 0.5, 0.25)),
    _one("neighbours ±4, wide", around_words=(2, 1, 0.7, 0.5, 0.3)),
    _weight("speaker named", "named_speaker", (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)),
    _choice("speakers' names among the words", "names", (0, 0.25, 0.5, 0.75, 1)),
    _choice("BM25 of the whole session", "session", _SHARES),
    _choice("sum over the session's candidates", "session", _SHARES, session_of="sum"),
    _weight("best match of the session", "session", (0, *_SHARES)),
    _choice("candidates of each leg", "candidates", (20, 50, 100, 200, 1_000)),
    _weight("memory score, after a meditation", "memory_score", (0, *_SHARES), is_scored=True),
    _weight("freshness, asked at the end", "freshness", (0, *_SHARES), is_asked_then=True),
    replace(
        _weight("λ: share of the vectors", "semantic", (0.3, 0.4, 0.5, 0.6, 0.7)), by_words=False
    ),
    _of_vectors("vectors: own only", around_meaning=(1,)),
    _of_vectors("vectors: neighbours ±1", around_meaning=(2, 1)),
    _of_vectors("vectors: neighbours ±4, wide", around_meaning=(2, 1, 0.7, 0.5, 0.3)),
    _of_vectors("what a leg left out counts 0", has_floor=False),
)


@app.command()
def main(
    data: Annotated[
        Path, typer.Option(envvar="BENCH_DATA", help="The conversations, as JSON.")
    ] = conversations.DATA,
) -> None:
    """Rank conversations in process by one idea after the other, and print recall@10 of each.

    Each idea is one change from what the service does. `best` is the setting with the highest mean
    over all questions, `recall@10` that mean. Held out: each conversation is ranked with the
    setting that is best for the other ones. The gain of that over the service is given with its
    standard error, over questions. It takes some minutes.
    """
    try:
        told = list(map(Told, conversations.load(data)))
    except DataError as error:
        notices.print(error)
        raise typer.Exit(1) from error
    legs = {"words": False}
    if told[0].conversation.turns[0].vector is not None:
        legs["words and vectors"] = True
    for leg, with_vectors in legs.items():
        ideas = [one for one in IDEAS if one.by_words or with_vectors]
        rows = _rows(leg, told, ideas, with_vectors=with_vectors)
        print(f"\n{leg.capitalize()}:\n\n{markdown(_HEAD, rows)}")


def _rows(
    leg: str, told: Sequence[Told], ideas: Sequence[Idea], *, with_vectors: bool
) -> list[list[str]]:
    usual: Recalls = []
    rows = []
    with step(leg, sum(len(idea.settings) for idea in ideas)) as advance:
        for idea in ideas:
            tried = {}
            for label, setting in idea.settings.items():
                tried[label] = _recalls(told, setting, with_vectors=with_vectors)
                advance(1)
            usual = usual or tried[""]
            rows.append([idea.name, *_told_of(tried, usual)])
    return rows


def _recalls(told: Sequence[Told], setting: Setting, *, with_vectors: bool) -> Recalls:
    return [
        np.array([one.recall_at_10 for one in judged(each, setting, with_vectors=with_vectors)])
        for each in told
    ]


def _told_of(tried: Mapping[str, Recalls], usual: Recalls) -> list[str]:
    best = _best(tried.values())
    label = next(label for label, recalls in tried.items() if recalls is best)
    held_out = np.concatenate(_held_out(list(tried.values())))
    gained = held_out - np.concatenate(usual)
    error = gained.std() / np.sqrt(len(gained))
    gain = f"{gained.mean():+.4f} ± {error:.4f}" if gained.any() else ""
    return [label, f"{_mean(best):.4f}", f"{held_out.mean():.4f}", gain]


def _held_out(tried: Sequence[Recalls]) -> Recalls:
    """Return the recalls of each conversation by what is best for all others."""
    held_out = []
    for place in range(len(tried[0])):
        others = [[*recalls[:place], *recalls[place + 1 :]] for recalls in tried]
        chosen = max(range(len(tried)), key=lambda one: _mean(others[one]))
        held_out.append(tried[chosen][place])
    return held_out


def _best(tried: Iterable[Recalls]) -> Recalls:
    return max(tried, key=_mean)


def _mean(recalls: Recalls) -> float:
    return float(np.concatenate(recalls).mean())


if __name__ == "__main__":
    app()
