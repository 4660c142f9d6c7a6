"""Sentiment of texts."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.sentiment import sentiments


def test_good_news_is_above_bad_news_and_facts_are_between() -> None:
    good, fact, bad = sentiments(
        ["I love this wonderful city!", "The train leaves at nine.", "I hate this awful disaster."]
    )
    assert good > 0.8
    assert fact == 0.5
    assert bad < 0.2


def test_no_texts_have_no_sentiments() -> None:
    assert sentiments([]).shape == (0,)


@given(st.lists(st.text(max_size=80), max_size=5))
def test_every_text_has_a_sentiment(texts: list[str]) -> None:
    found = sentiments(texts)
    assert found.dtype == np.float32
    assert len(found) == len(texts)
    assert np.all((found >= 0) & (found <= 1))


def test_longest_text_takes_no_longer_than_a_heartbeat() -> None:
    started = time.perf_counter()
    sentiments(["but good " * 7000])
    assert time.perf_counter() - started < 2
