"""What users may do with memories, as hypothesis tells it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from google.protobuf.message import Message
from hypothesis import strategies as st
from kimberly.memory.v1 import memory_pb2 as pb

Etag = Literal["none", "current", "stale"]
CREATING = {"CreateMemory", "BatchCreateMemories"}


@dataclass(frozen=True)
class Act:
    """A call as a story tells it: which memory it is about turns out when it is made."""

    who: int
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the request, without id and etag."""
    whose: int | None = None
    """Whose memory it is about; None: their own."""
    back: int = 0
    """Which of that person's: so many were created after it."""
    etag: Etag = "none"

    @property
    def creates(self) -> bool:
        return self.method in CREATING

    def request(self, memory_id: str, version: int) -> Message:
        """Return the request for a memory that is at some version."""
        request: Any = getattr(pb, f"{self.method}Request")(**self.fields)
        if not self.creates:
            target = request.memory if self.method == "UpdateMemory" else request
            target.id = memory_id
            if self.etag != "none" and "etag" in target.DESCRIPTOR.fields_by_name:
                target.etag = f"v{version if self.etag == 'current' else version - 1}"
        return cast("Message", request)


def _update_of(fields: dict[str, Any]) -> dict[str, Any]:
    return {"memory": fields, "update_mask": {"paths": list(fields)}}


people = st.integers(0, 3)
_tiers = st.sampled_from([pb.TIER_LONG_TERM, pb.TIER_PERMANENT])
_scopes = st.sampled_from([pb.SCOPE_PRIVATE, pb.SCOPE_SHARED, pb.SCOPE_PUBLIC])
_texts = st.sampled_from(["a", "żółw 🐢", "the door code is 7", "x" * 50])
_labels = st.lists(st.sampled_from(["t", "ü", "a key"]), max_size=3)
_speakers = st.sampled_from(["", "Ann"])
_instants = st.sampled_from([{"seconds": 0}, {"seconds": 1_700_000_000}])
_optional = {
    "tags": _labels,
    "channels": _labels,
    "scope": _scopes,
    "speaker": _speakers,
    "occur_time": _instants,
}
_places = st.sampled_from(
    [{}, {"session_id": "s"}, *({"session_id": "s", "session_position": n} for n in range(2))]
)
drafts = st.builds(
    operator.or_,
    st.fixed_dictionaries(
        {"content": _texts, "tier": _tiers}, optional={**_optional, "protected": st.booleans()}
    ),
    _places,
)
_request_ids = st.sampled_from(["", "", "r1", "r2"])
_creations = st.one_of(
    st.tuples(
        st.just("CreateMemory"),
        st.fixed_dictionaries({"memory": drafts, "request_id": _request_ids}),
    ),
    st.tuples(
        st.just("BatchCreateMemories"),
        st.fixed_dictionaries(
            {
                "memories": st.lists(drafts, min_size=1, max_size=3),
                "request_id": _request_ids,
            }
        ),
    ),
)
_updates = st.fixed_dictionaries({}, optional={**_optional, "content": _texts, "tier": _tiers})
_changes = st.one_of(
    st.tuples(st.just("UpdateMemory"), _updates.filter(bool).map(_update_of)),
    st.tuples(st.just("ArchiveMemory"), st.just({})),
    st.tuples(st.just("RestoreMemory"), st.just({})),
    st.tuples(
        st.just("DeleteMemory"),
        st.sampled_from([{}, {"grace": {"seconds": 60}}, {"grace": {"seconds": 40 * 86_400}}]),
    ),
    st.tuples(st.just("ProtectMemory"), st.fixed_dictionaries({"protected": st.booleans()})),
    st.tuples(
        st.just("GiveFeedback"),
        st.sampled_from(
            [{"thumbs_up": True}, {"thumbs_down": True}, {"rating": 5}, {"useful": True}]
        ),
    ),
)
_etags: st.SearchStrategy[Etag] = st.sampled_from(["none", "none", "current", "stale"])


@st.composite
def _creating(draw: st.DrawFn) -> Act:
    method, fields = draw(_creations)
    return Act(draw(people), method, fields)


@st.composite
def _changing(draw: st.DrawFn, whose: st.SearchStrategy[int | None]) -> Act:
    method, fields = draw(_changes)
    return Act(draw(people), method, fields, draw(whose), draw(st.integers(0, 5)), draw(_etags))


creating = _creating()
changing = _changing(st.none())
acts = st.one_of(creating, changing, changing, _changing(people))
