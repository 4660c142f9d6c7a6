"""What is another's looks exactly like what does not exist, for every method that names something.

The cases are made from the contract: `meanings.FIELDS` says what each field names, and a field
that it does not know fails the first test.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final, Literal

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import json_format, message_factory
from google.protobuf.message import Message
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import access, ids
from tests.abuse.doors import Doors, PastTheEdge
from tests.abuse.estates import (
    MODEL,
    SHARED,
    STATES,
    Estate,
    Make,
    aim,
    embed,
    keep,
    look_at,
    schedule,
    settle,
)
from tests.abuse.meanings import (
    FIELDS,
    IDS,
    METHODS,
    NAMED,
    Means,
    fields_of,
    fields_that_mean,
    put,
    request_of,
    shown,
)
from tests.mesh import User
from tests.refusals import Refusal, read
from tests.transports import method_taking, path_of, refusal_in, rule_of

COLLEAGUE: Final = "of the same tenant"
STRANGER: Final = "of another tenant"
SELF: Final = "the same person in another tenant"
Whose = Literal["of the same tenant", "of another tenant", "the same person in another tenant"]

REFERENCES: Final = fields_that_mean(*IDS, *NAMED)
OWN_REFUSALS: Final = {
    "CompleteAttachment": "UPLOAD_MISMATCH",
    "LeaveTenant": "STATE_CONFLICT",
    "RetryJob": "STATE_CONFLICT",
    "CancelJob": "STATE_CONFLICT",
}
"""What an owner is told because of the state of the thing."""

_ANY_ID: Final = re.compile(rb"(?:mem|att|med|job|sch|usr|aud|goa|exp|agt|key)_[0-9a-f]{32}")
_LAST: Final = {"end", "caught_up"}
_OF_ONE_CALL: Final = {"date", "x-request-id", "x-envoy-upstream-service-time"}
_SIDECAR: Final = "sidecar"


@pytest_asyncio.fixture(autouse=True)
async def a_day_later(mesh: Mesh, request: pytest.FixtureRequest) -> None:
    """Move all exports into the past: a user may have five a day, and doors are many."""
    if "Export" in request.node.name:
        connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
        await connection.execute("UPDATE exports SET created_at = created_at - interval '1 day'")
        await connection.close()


# --- asking ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """All that an answer says, but for what tells one call from the next."""

    code: object
    headers: Mapping[str, object]
    body: bytes
    answer: Message | None
    """None for a refusal."""
    refusal: Refusal | None

    def ids(self) -> set[str]:
        """Return every id that the answer shows."""
        return {found.decode() for found in _ANY_ID.findall(self.body)}


async def over_grpc(user: User, request: Message) -> Told:
    """Call over gRPC. Of a stream that does not end by itself, read until it has caught up."""
    return await _told(user.grpc.begin(request), request)


async def at_a_sidecar(doors: Doors, user: User, request: Message) -> Told:
    """Call over gRPC, past the edge and as it does."""
    past = await PastTheEdge(doors, user.token).over(request)
    return await _told(past.begin(request), request)


async def _told(call: Any, request: Message) -> Told:
    try:
        if not method_taking(request).server_streaming:
            answer = await call
            headers = [*await call.initial_metadata(), *await call.trailing_metadata()]
            return Told("OK", _kept(headers), answer.SerializeToString(), answer, None)
        body = b""
        async for answer in call:
            body += answer.SerializeToString()
            if _is_last(answer):
                break
    except grpc.aio.AioRpcError as error:
        headers = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        body = (error.details() or "").encode()
        return Told(error.code(), _kept(headers), body, None, read(error))
    return Told("OK", {}, body, answer, None)


async def over_rest(user: User, request: Message) -> Told:
    """Call over REST. Of a stream that does not end by itself, read until it has caught up."""
    method = method_taking(request)
    make = message_factory.GetMessageClass(method.output_type)
    async with user.rest.begin(request) as response:
        headers = _kept(response.headers.items())
        if response.status_code != httpx.codes.OK:
            body = await response.aread()
            return Told(response.status_code, headers, body, None, refusal_in(response))
        body = b""
        async for line in response.aiter_lines():
            body += line.encode()
            answer = json_format.ParseDict(json.loads(line), make())
            if _is_last(answer):
                break
    return Told(response.status_code, headers, body, answer, None)


Ask = Callable[[User, Message], Awaitable[Told]]
ASK: Final[Mapping[str, Ask]] = {"grpc": over_grpc, "rest": over_rest}


def _kept(headers: Iterable[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in headers if name not in _OF_ONE_CALL}


def _is_last(answer: Any) -> bool:
    return any(answer.WhichOneof(each.name) in _LAST for each in answer.DESCRIPTOR.oneofs)


@pytest.fixture(params=[*ASK, _SIDECAR])
def ask(request: pytest.FixtureRequest, doors: Doors) -> Ask:
    """How a user calls: through the edge over gRPC and over REST, and straight at the sidecars."""
    if request.param == _SIDECAR:
        return partial(at_a_sidecar, doors)
    return ASK[request.param]


# --- who has what ------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module")
async def anns(ann: User) -> Estate:
    """What Ann has."""
    return await settle(ann)


@pytest_asyncio.fixture(scope="module")
async def before(anns: Estate) -> list[object]:
    """What Ann saw of it before others came."""
    return await look_at(anns)


@pytest_asyncio.fixture(scope="module")
async def others(
    cy: User, bob: User, ann_at_bobs: User, before: list[object]
) -> Mapping[str, User]:
    """Who wants it. They consented to all that Ann did."""
    for other in (cy, bob, ann_at_bobs):
        await embed(other)
    return {COLLEAGUE: cy, STRANGER: bob, SELF: ann_at_bobs}


@pytest_asyncio.fixture(scope="module")
async def owned(ann: User, others: Mapping[str, User]) -> Mapping[str, str]:
    """A memory of everybody's, by their ids, for requests that need one of the caller's own."""
    return {user.id: await keep(user) for user in (ann, *others.values())}


async def complete(user: User, owned: Mapping[str, str], method: str) -> Message:
    """Return a request about nothing but what its caller has."""
    request = request_of(METHODS[method])
    for path, means in FIELDS.get(method, {}).items():
        if means is Means.MEMORY:
            put(request, path, owned[user.id])
    return request


def naming(method: str, path: str, name: str) -> Message:
    """Return a request about something."""
    request = request_of(METHODS[method])
    put(request, path, name)
    return request


def missing(means: Means) -> str:
    """Return a name of this kind that stands for nothing."""
    if means in IDS:
        return ids.show(means.value, ids.new_id())
    return secrets.token_hex(4)


# --- the table ---------------------------------------------------------------------------------


def test_the_table_knows_every_field_that_names_something() -> None:
    contract = {
        (method.name, path) for method in METHODS.values() for path in fields_of(method.input_type)
    }
    assert contract == {(method, path) for method, fields in FIELDS.items() for path in fields}


def test_whatever_can_be_named_somebody_has() -> None:
    assert set(STATES) == {FIELDS[method][path] for method, path in REFERENCES}


# --- things ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), REFERENCES)
async def test_what_is_ones_own_is_served(
    ann: User, anns: Estate, ask: Ask, method: str, path: str
) -> None:
    make = next(iter(STATES[FIELDS[method][path]].values()))
    told = await ask(ann, naming(method, path, await make(ann)))
    assert (told.refusal.reason if told.refusal else None) == OWN_REFUSALS.get(method), told


@pytest.mark.parametrize("whose", [COLLEAGUE, STRANGER, SELF])
@pytest.mark.parametrize(("method", "path"), REFERENCES)
async def test_what_is_anothers_is_as_good_as_missing(
    anns: Estate, others: Mapping[str, User], ask: Ask, whose: Whose, method: str, path: str
) -> None:
    means = FIELDS[method][path]
    nothing = await ask(others[whose], naming(method, path, missing(means)))
    expect_nothing(nothing, path)
    for state, name in anns.names[means].items():
        if not is_shown(method, means, state, whose):
            assert await ask(others[whose], naming(method, path, name)) == nothing, state


def is_shown(method: str, means: Means, state: str, whose: Whose) -> bool:
    if means is Means.LOG_IN:
        # A person has the sessions of their account, wherever they are.
        return whose == SELF
    if means is Means.TENANT:
        return whose != STRANGER
    return (method, state, whose) == ("GetMemory", SHARED, COLLEAGUE)


def expect_nothing(told: Told, path: str) -> None:
    if isinstance(told.answer, pb.UploadEmbeddingsResponse):
        # It says of each vector whether it was kept.
        (refusal,) = told.answer.refusals
        assert (told.answer.stored, refusal.field) == (0, shown(path))
        return
    assert told.refusal
    assert told.refusal.code is grpc.StatusCode.NOT_FOUND
    assert (told.refusal.reason, told.refusal.fields) == ("RESOURCE_NOT_FOUND", ())


async def test_what_is_shared_is_read_by_the_tenant_and_says_whose_it_is(
    anns: Estate, others: Mapping[str, User], ask: Ask
) -> None:
    request = pb.GetMemoryRequest(id=anns.names[Means.MEMORY][SHARED])
    told = await ask(others[COLLEAGUE], request)
    assert isinstance(told.answer, pb.GetMemoryResponse)
    memory = told.answer.memory
    assert (memory.user_id, memory.scope) == (anns.user.id, pb.SCOPE_SHARED)
    assert not memory.HasField("score")
    assert not memory.HasField("feedback")


@pytest.mark.parametrize(("method", "path"), REFERENCES)
async def test_what_can_be_no_name_is_refused_with_its_field(
    others: Mapping[str, User], anns: Estate, ask: Ask, method: str, path: str
) -> None:
    for name in malformed(FIELDS[method][path], anns):
        if ask is over_rest and is_no_path(method, path, name):
            continue
        told = await ask(others[COLLEAGUE], naming(method, path, name))
        assert told.refusal, name
        assert told.refusal.code is grpc.StatusCode.INVALID_ARGUMENT, name
        assert (told.refusal.reason, told.refusal.fields) == ("FIELD_INVALID", (shown(path),))


def malformed(means: Means, anns: Estate) -> list[str]:
    """Return what can be no name of this kind, ids of other kinds among it."""
    if means in NAMED:
        return ["", "n" * (65 if means is Means.IMPORT else 129), "a\0b"]
    kind, digits = means.value, uuid.uuid4().hex
    others = [next(iter(anns.names[each].values())) for each in IDS if each is not means]
    return [
        *others,
        anns.user.id,
        "",
        "*",
        digits,
        f"{kind}_",
        f"{kind}_{digits[1:]}",
        f"{kind}_{digits}0",
        f"{kind}_{digits}\n",
        f"{kind}_{uuid.UUID(digits)}",
        f"{kind}_{digits[:-1]}G",
        f"{kind}_{digits}\0",
        f" {kind}_{digits}",
        f"{kind}_{digits}".upper(),
        f"{kind}:{digits}",
        f"../{kind}_{digits}",
    ]


def is_no_path(method: str, path: str, name: str) -> bool:
    """Tell whether Envoy alone would answer: it takes this for no path of the contract."""
    rule = rule_of(METHODS[method])
    in_path = f"{{{path}}}" in getattr(rule, rule.WhichOneof("pattern"))
    return in_path and (not name or "\0" in name or "/" in name)


# --- places in lists and streams ---------------------------------------------------------------


ONE_OF_EACH: Final[Mapping[str, Make]] = {"ListGoals": aim, "ListSchedules": schedule}
"""Lists of what an estate has one of: how another is made."""


async def place_of(estate: Estate, method: str) -> tuple[Message, str]:
    """Return how an owner asks for a list, and where it goes on after the first entry."""
    user, memories = estate.user, estate.names[Means.MEMORY]
    if method == "WatchMemories":
        export = [part async for part in user.grpc.stream(pb.ExportMemoriesRequest())]
        return pb.WatchMemoriesRequest(), export[-1].end.cursor
    request: Any = request_of(METHODS[method])
    if method in ONE_OF_EACH:
        await ONE_OF_EACH[method](user)
    if method == "ListMemoryVersions":
        request.id = memories["archived"]
    if method == "ListAttachments":
        request.memory_id = await keep(user)
        for _ in range(2):
            await user.grpc(naming("CreateAttachment", "memory_id", request.memory_id))
    request.page_size = 1
    token: str = (await user.grpc(request)).next_page_token
    assert token, "there must be two of everything"
    return request, token


@pytest.mark.parametrize(("method", "path"), fields_that_mean(Means.PLACE))
async def test_a_place_in_anothers_list_is_as_good_as_damaged(
    anns: Estate,
    others: Mapping[str, User],
    owned: Mapping[str, str],
    ask: Ask,
    method: str,
    path: str,
) -> None:
    request, place = await place_of(anns, method)
    put(request, path, place)
    assert (await ask(anns.user, request)).refusal is None
    for other in others.values():
        about_own = await complete(other, owned, method)
        for attempt in (request, about_own):
            answers = []
            for token in (place, f"A{place[1:]}", f"{place[:-1]}", "AAAA", "?"):
                put(attempt, path, token)
                answers.append(await ask(other, attempt))
            assert answers == [answers[0]] * len(answers)
            assert answers[0].refusal
            assert answers[0].refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert answers[0].refusal.fields == (path,)
        put(request, path, place)


# --- what narrows, what is free, what counts for nothing ---------------------------------------


@pytest.mark.parametrize("whose", [COLLEAGUE, STRANGER])
@pytest.mark.parametrize(("method", "path"), fields_that_mean(Means.FILTER))
async def test_a_filter_by_what_is_anothers_finds_what_one_by_nothing_does(
    anns: Estate, others: Mapping[str, User], ask: Ask, whose: Whose, method: str, path: str
) -> None:
    foreign = MODEL if path.endswith("model") else anns.names[Means.SESSION]["begun"]
    if path.endswith("model"):
        # Theirs is called so too; then there is nothing of that name.
        await others[whose].grpc(pb.DeleteEmbeddingsRequest(model=MODEL))
    told = await ask(others[whose], naming(method, path, foreign))
    assert told.refusal is None
    assert told == await ask(others[whose], naming(method, path, missing(Means.SESSION)))
    assert told.ids().isdisjoint(anns.ids())


@pytest.mark.parametrize(("method", "path"), fields_that_mean(Means.FREE))
async def test_a_name_that_another_gave_away_is_free(
    ann: User,
    others: Mapping[str, User],
    owned: Mapping[str, str],
    ask: Ask,
    method: str,
    path: str,
) -> None:
    name, seen = secrets.token_hex(4), set[str]()
    for user in (ann, *others.values()):
        request = await complete(user, owned, method)
        put(request, path, name)
        told = await ask(user, request)
        assert told.refusal is None, told
        assert told.ids().isdisjoint(seen)
        seen |= told.ids()


@pytest.mark.parametrize(("method", "path"), fields_that_mean(Means.FREE))
async def test_a_name_that_is_none_is_refused_with_its_field(
    ann: User, owned: Mapping[str, str], ask: Ask, method: str, path: str
) -> None:
    request = await complete(ann, owned, method)
    for name in ("n" * 129, "a\0b"):
        if ask is over_rest and is_no_path(method, path, name):
            continue
        put(request, path, name)
        told = await ask(ann, request)
        if isinstance(told.answer, pb.ImportMemoriesResponse):
            assert [each.field for each in told.answer.refusals] == [shown(path)]
            continue
        assert told.refusal, name
        assert told.refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert told.refusal.fields == (shown(path),)


@pytest.mark.parametrize(("method", "path"), fields_that_mean(Means.NOTHING))
async def test_what_only_the_server_says_counts_for_nothing(
    anns: Estate,
    others: Mapping[str, User],
    owned: Mapping[str, str],
    ask: Ask,
    method: str,
    path: str,
) -> None:
    said = {
        "id": anns.names[Means.MEMORY]["long-term"],
        "user_id": anns.user.id,
        "session_id": anns.names[Means.SESSION]["begun"],
        # Not Ann's, of whose tenant one of them is.
        "tenant_id": ids.show(ids.TENANT, ids.new_id()),
    }[path.rpartition(".")[2]]
    for other in others.values():
        request = await complete(other, owned, method)
        put(request, path, said)
        told = await ask(other, request)
        assert told.refusal is None
        assert said.encode() not in told.body


async def test_two_conversations_of_one_name_are_two(
    ann: User, others: Mapping[str, User], ask: Ask
) -> None:
    turns = [pb.SessionTurn(content="the same words")]
    request = pb.AppendToSessionRequest(session_id=secrets.token_hex(4), turns=turns)
    for user in (ann, *others.values()):
        told = await ask(user, request)
        assert isinstance(told.answer, pb.AppendToSessionResponse)
        assert [turn.session_position for turn in told.answer.memories] == [0]


async def test_an_import_of_anothers_name_begins_at_the_beginning(
    ann: User, others: Mapping[str, User], ask: Ask
) -> None:
    memories = [pb.Memory(content=secrets.token_hex(4))]
    request = pb.ImportMemoriesRequest(request_id=secrets.token_hex(4), memories=memories)
    for user in (ann, *others.values()):
        told = await ask(user, request)
        assert isinstance(told.answer, pb.ImportMemoriesResponse)
        assert (told.answer.created, told.answer.skipped) == (1, 0)


# --- lists -------------------------------------------------------------------------------------

READING: Final = sorted(
    method.name
    for method in METHODS.values()
    if (rule_of(method).get or method.name == "QueryMemories")
    # Whoever may look at the tenant sees who is in it.
    and access.METHODS[path_of(method)] is not access.Access.AUDITOR
    and not any(
        means in (*IDS, *NAMED, Means.TASK, Means.END)
        for means in FIELDS.get(method.name, {}).values()
    )
)


LISTS: Final = [
    (whose, method)
    for whose, method in product([COLLEAGUE, STRANGER, SELF], READING)
    # That one shows whom the same person is elsewhere.
    if (whose, method) != (SELF, "ListTenants")
]


@pytest.mark.parametrize(("whose", "method"), LISTS)
async def test_no_list_or_stream_shows_what_is_anothers(
    anns: Estate, others: Mapping[str, User], ask: Ask, whose: Whose, method: str
) -> None:
    request: Any = request_of(METHODS[method])
    if "page_size" in request.DESCRIPTOR.fields_by_name:
        request.page_size = 1000
    told = await ask(others[whose], request)
    assert told.refusal is None
    assert told.ids().isdisjoint({*anns.ids(), anns.user.id})


async def test_of_anothers_memories_only_the_shared_ones_are_listed_and_found(
    anns: Estate, others: Mapping[str, User], ask: Ask
) -> None:
    for request in (
        pb.ListMemoriesRequest(shared=True, page_size=1000),
        pb.QueryMemoriesRequest(query="mine", include_shared=True, top_k=100),
    ):
        for other in (STRANGER, SELF):
            assert (await ask(others[other], request)).ids().isdisjoint(anns.ids())
        seen = (await ask(others[COLLEAGUE], request)).ids() & anns.ids()
        assert seen == {anns.names[Means.MEMORY][SHARED]}


async def test_links_of_anothers_events_say_nothing_of_them(
    anns: Estate, others: Mapping[str, User], ask: Ask
) -> None:
    told = await ask(others[COLLEAGUE], users.ListAuditLinksRequest(page_size=1000))
    assert isinstance(told.answer, users.ListAuditLinksResponse)
    withheld = [link for link in told.answer.links if link.withheld]
    assert withheld, "the chain is the tenant's, and Ann has events in it"
    assert {(link.HasField("event"), link.user_id) for link in withheld} == {(False, "")}


# --- URLs, and afterwards ----------------------------------------------------------------------


async def test_bob_cannot_put_another_file_under_anns_url(
    ann: User, bob: User, anns: Estate, owned: Mapping[str, str]
) -> None:
    announced = await bob.grpc(naming("CreateAttachment", "memory_id", owned[bob.id]))
    mine, hers = announced.attachment.id[4:], anns.names[Means.ATTACHMENT]["pending"][4:]
    assert mine in announced.upload_url
    url = announced.upload_url.replace(mine, hers)
    for bobs, anns_own in ((bob.id, ann.id), (bob.tenant_id, ann.tenant_id)):
        url = url.replace(bobs[4:], anns_own[4:])
    assert (await bob.rest.http.put(url, content=b"x")).status_code == 403


async def test_ann_still_has_what_is_hers(anns: Estate, before: list[object]) -> None:
    # And the names were the right ones: what others were refused is there.
    assert await look_at(anns) == before
