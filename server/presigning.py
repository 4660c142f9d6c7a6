"""Presigned URLs of S3 that bind headers too (AWS Signature Version 4, in the query)."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import SplitResult, quote

_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, slots=True)
class Key:
    """What URLs are signed with."""

    access_key: str
    secret_key: str
    region: str


def presign(
    key: Key,
    method: str,
    url: SplitResult,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    lifetime: timedelta,
    now: datetime,
) -> str:
    """Return a URL that lets its bearer make one kind of request, for a while.

    Args:
        key: What to sign with.
        method: The HTTP method that the URL is for.
        url: Scheme, host and path of the object; the path is quoted already.
        query: Further parameters of the URL, which are bound as well.
        headers: Headers, by their lowercase names, that the request must have with these values.
        lifetime: How long the URL works.
        now: When it begins to work.
    """
    moment = now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{moment[:8]}/{key.region}/s3/aws4_request"
    bound = {"host": url.netloc, **headers}
    names = ";".join(sorted(bound))
    parameters = {
        **query,
        "X-Amz-Algorithm": _ALGORITHM,
        "X-Amz-Credential": f"{key.access_key}/{scope}",
        "X-Amz-Date": moment,
        "X-Amz-Expires": str(int(lifetime.total_seconds())),
        "X-Amz-SignedHeaders": names,
    }
    encoded = "&".join(f"{_quoted(k)}={_quoted(v)}" for k, v in sorted(parameters.items()))
    lines = [f"{name}:{value}" for name, value in sorted(bound.items())]
    request = "\n".join([method, url.path, encoded, *lines, "", names, "UNSIGNED-PAYLOAD"])
    text = f"{_ALGORITHM}\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(key, scope), text.encode(), "sha256").hex()
    return url._replace(query=f"{encoded}&X-Amz-Signature={signature}").geturl()


def _signing_key(key: Key, scope: str) -> bytes:
    derived = f"AWS4{key.secret_key}".encode()
    for part in scope.split("/"):
        derived = hmac.digest(derived, part.encode(), "sha256")
    return derived


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")
