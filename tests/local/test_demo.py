"""What the demo reads."""

import json
from pathlib import Path

import pytest

from local import demo


def test_sample_is_a_long_conversation_that_answers_its_questions() -> None:
    turns = demo.read_transcript(demo.SAMPLE)
    assert len(turns) >= 200
    for entry in json.loads(demo.SAMPLE_QUESTIONS.read_text()):
        assert any(entry["answer"] in turn.text for turn in turns)
    assert len(demo.questions_about(demo.SAMPLE, turns)) == 3


def test_an_hour_of_silence_begins_a_new_session(tmp_path: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    times = ["2026-05-04T12:00:00Z", "2026-05-04T12:59:00+00:00", "2026-05-04T14:30:00"]
    lines = [{"speaker": "Ann", "text": f"turn {n}", "time": time} for n, time in enumerate(times)]
    talk.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    memories = demo.to_memories(demo.read_transcript(talk))
    assert [(m.session_id, m.session_position) for m in memories] == [
        ("session-1", 0),
        ("session-1", 1),
        ("session-2", 0),
    ]
    assert memories[2].occur_time.ToJsonString() == "2026-05-04T14:30:00Z"
    assert len(demo.questions_about(talk, demo.read_transcript(talk))) == 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "holds no turns"),
        ("not json", "line 1: Expecting value"),
        ("[]", "line 1: list indices"),
        ('{"speaker": "Ann", "text": "Hello"}', "line 1: no 'time'"),
        ('{"speaker": "Ann", "text": "Hello", "time": "noon"}', "line 1: Invalid isoformat"),
    ],
)
def test_unreadable_transcript_names_line_and_reason(
    tmp_path: Path, line: str, problem: str
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(line)
    with pytest.raises(demo.TranscriptError, match=problem):
        demo.read_transcript(talk)
