"""What users call themselves, their agents and their keys."""

import unicodedata
from typing import Final

from server.errors import InvalidArgument

_LONGEST: Final = 100


def check_display_name(asked: str, field: str) -> str:
    """Return what to call somebody or something, without the spaces around it.

    Raises:
        InvalidArgument: It has no characters, over 100, or control characters.
    """
    name = asked.strip()
    if not 1 <= len(name) <= _LONGEST:
        raise InvalidArgument(field, f"must have 1 to {_LONGEST} characters")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise InvalidArgument(field, "must have no control characters")
    return name
