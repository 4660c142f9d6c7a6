"""Email addresses as names of accounts."""

from typing import Final

from email_validator import EmailNotValidError, validate_email

from server.errors import InvalidArgument

_LONGEST: Final = 254


def normalize(address: str, field: str) -> str:
    """Return the one spelling that names the account: trimmed, lower case, Unicode NFC.

    Nothing is asked of the DNS: whether mail arrives is found out by sending one.

    Raises:
        InvalidArgument: It is no email address; the violation says why.
    """
    if len(address) > 2 * _LONGEST:
        raise InvalidArgument(field, f"must have at most {_LONGEST} characters")
    try:
        return validate_email(address.strip(), check_deliverability=False).normalized.lower()
    except EmailNotValidError as error:
        raise InvalidArgument(field, str(error)) from error
