"""Signatures, by the example of AWS ("Authenticating Requests: Using Query Parameters")."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

from server.presigning import Key, presign

KEY = Key("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
NOW = datetime(2013, 5, 24, tzinfo=UTC)
URL = urlsplit("https://examplebucket.s3.amazonaws.com/test.txt")


def test_signature_is_the_documented_one() -> None:
    url = presign(KEY, "GET", URL, {}, {}, timedelta(days=1), NOW)
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Signature"] == [
        "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    ]
    assert query["X-Amz-Expires"] == ["86400"]
    assert query["X-Amz-SignedHeaders"] == ["host"]


def test_everything_that_is_bound_changes_the_signature() -> None:
    hour = timedelta(hours=1)
    urls = {
        presign(KEY, "PUT", URL, {}, {}, hour, NOW),
        presign(KEY, "GET", URL, {}, {}, hour, NOW),
        presign(KEY, "PUT", URL._replace(path="/other.txt"), {}, {}, hour, NOW),
        presign(KEY, "PUT", URL, {"partNumber": "1"}, {}, hour, NOW),
        presign(KEY, "PUT", URL, {}, {"content-length": "5"}, hour, NOW),
        presign(KEY, "PUT", URL, {}, {"content-length": "6"}, hour, NOW),
        presign(KEY, "PUT", URL, {}, {}, 2 * hour, NOW),
        presign(KEY, "PUT", URL, {}, {}, hour, NOW + hour),
    }
    assert len({url.rpartition("=")[2] for url in urls}) == 8
