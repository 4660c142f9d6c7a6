"""The public contract over both of its transports: one call, made as gRPC or as REST."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import grpc
import httpx
from google.api import annotations_pb2
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from kimberly.agents.v1 import agents_pb2
from kimberly.auth.v1 import auth_pb2
from kimberly.billing.v1 import billing_pb2
from kimberly.jobs.v1 import jobs_pb2
from kimberly.memory.v1 import memory_pb2
from kimberly.privacy.v1 import privacy_pb2
from kimberly.users.v1 import users_pb2

from tests.canaries import WATCH
from tests.refusals import Refusal, read

MODULES = (auth_pb2, billing_pb2, users_pb2, privacy_pb2, memory_pb2, jobs_pb2, agents_pb2)
CODES = {code.value[0]: code for code in grpc.StatusCode}
_VARIABLE = re.compile(r"\{([^}=]+)}")
_KIND = {False: "unary", True: "stream"}

Metadata = tuple[tuple[str, str], ...]


class Refused(Exception):
    """A call was refused."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Transport(Protocol):
    """Calls the method that takes the request. A method that takes a stream takes several."""

    async def __call__(self, request: Message, *more: Message) -> Any:
        """Return the response.

        Raises:
            Refused: The mesh said no.
        """

    def stream(self, request: Message) -> AsyncIterator[Any]:
        """Yield the responses of a method that answers with a stream.

        Raises:
            Refused: The mesh said no.
        """


@dataclass(frozen=True, slots=True)
class Grpc:
    """Calls over gRPC."""

    channel: grpc.aio.Channel
    metadata: Metadata = ()

    async def __call__(self, request: Message, *more: Message) -> Any:
        try:
            return await self.begin(request, *more)
        except grpc.aio.AioRpcError as error:
            raise Refused(read(error)) from error

    async def stream(self, request: Message) -> AsyncIterator[Any]:
        try:
            async for response in self.begin(request):
                yield response
        except grpc.aio.AioRpcError as error:
            raise Refused(read(error)) from error

    def begin(self, request: Message, *more: Message) -> Any:
        """Return the call, which is on its way."""
        method = method_taking(request)
        kind = f"{_KIND[method.client_streaming]}_{_KIND[method.server_streaming]}"
        response = message_factory.GetMessageClass(method.output_type)
        start = getattr(self.channel, kind)(
            path_of(method),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        sent = _each(request, *more) if method.client_streaming else request
        return start(sent, metadata=self.metadata)


@dataclass(frozen=True, slots=True)
class Rest:
    """Calls over REST."""

    http: httpx.AsyncClient
    token: str = ""

    async def __call__(self, request: Message, *more: Message) -> Any:
        method = method_taking(request)
        response = await self.raw(*to_http(method, request, *more))
        if response.status_code != httpx.codes.OK:
            raise Refused(refusal_in(response))
        return _response(method, response.json())

    async def stream(self, request: Message) -> AsyncIterator[Any]:
        async with self.begin(request) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise Refused(refusal_in(response))
            async for line in response.aiter_lines():
                yield _response(method_taking(request), json.loads(line))

    def begin(
        self, request: Message, *more: Message
    ) -> AbstractAsyncContextManager[httpx.Response]:
        """Call, and return the response before its body has come."""
        verb, path, body, query = to_http(method_taking(request), request, *more)
        return self.http.stream(verb, path, json=body, params=query, headers=self._headers({}))

    async def raw(
        self, verb: str, path: str, json: Any = None, params: Any = None, **options: Any
    ) -> httpx.Response:
        """Call a path."""
        headers = self._headers(options.pop("headers", {}))
        return await self.http.request(
            verb, path, json=json, params=params, headers=headers, **options
        )

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        known = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return known | dict(headers)


def public_methods() -> Iterator[MethodDescriptor]:
    """Yield every method that has a REST form."""
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from (each for each in service.methods if rule_of(each).WhichOneof("pattern"))


def rule_of(method: MethodDescriptor) -> Any:
    """Return the google.api.http rule of a method."""
    return method.GetOptions().Extensions[annotations_pb2.http]


def path_of(method: MethodDescriptor) -> str:
    """Return the full name of a method, with slashes."""
    return f"/{method.containing_service.full_name}/{method.name}"


def method_taking(request: Message) -> MethodDescriptor:
    """Return the method that takes a request."""
    return next(each for each in public_methods() if each.input_type is request.DESCRIPTOR)


def to_http(
    method: MethodDescriptor, request: Message, *more: Message
) -> tuple[str, str, Any, dict[str, Any]]:
    """Return verb, path, body and query of a REST call."""
    for said in (request, *more):
        WATCH.hear(said)
    rule = rule_of(method)
    verb = rule.WhichOneof("pattern")
    fields = json_format.MessageToDict(request)
    path = _VARIABLE.sub(lambda found: _pop(fields, found[1]), getattr(rule, verb))
    if method.client_streaming:
        return verb.upper(), path, [fields, *map(json_format.MessageToDict, more)], {}
    if rule.body == "*":
        return verb.upper(), path, fields, {}
    body = fields.pop(rule.body, {}) if rule.body else None
    return verb.upper(), path, body, fields


def refusal_in(response: httpx.Response) -> Refusal:
    """Return what the JSON of a refused REST call says."""
    body = response.json()
    assert set(body) == {"code", "message", "details"}, body
    status = json_format.ParseDict(body, status_pb2.Status())
    reason, fields = "", []
    for detail in status.details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason = info.reason
        if detail.Unpack(request):
            fields += [violation.field for violation in request.field_violations]
    return Refusal(CODES[status.code], reason, tuple(fields), status.message)


def _pop(fields: dict[str, Any], variable: str) -> str:
    *parents, last = (_camel(part) for part in variable.split("."))
    for parent in parents:
        fields = fields[parent]
    return quote(str(fields.pop(last)), safe="")


def _response(method: MethodDescriptor, fields: Any) -> Message:
    message = message_factory.GetMessageClass(method.output_type)()
    return json_format.ParseDict(fields, message)


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(word.capitalize() for word in tail)


async def _each(*messages: Message) -> AsyncIterator[Message]:
    for message in messages:
        yield message
