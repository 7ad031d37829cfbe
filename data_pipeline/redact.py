"""Credentials in URLs and in the environment: what is written or printed must not hold them.

URLs hold them as `https://user:password@host/...`, `s3://key:secret@bucket/...` or `...?X-Amz-Signature=...`.
"""

import os
import re
from typing import NamedTuple

# A user, and up to the last @ a password, which may have slashes; but not a host and its port.
_USER = r"(?P<user>[^\s/@:'\"]+:(?!\d+(?:/|\s|$))[^\s'\"]*@|[^\s/@:'\"]+@)?"
_URL = re.compile(
    rf"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://{_USER}(?P<rest>[^\s?'\"]*)(?P<query>\?(?:[^\s'\"]*[^\s'\":;,.)])?)?"
)
_WEB = ("http", "https")
# Their URLs name something else before the @.
_NO_USER = ("github", "abfs", "abfss", "az", "wasb", "wasbs")
_SECRET_PARAMETER = re.compile(r"sig|token|key|secret|passw|pwd|credential|auth|policy", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?|CONNECTION_STRING|(?:ACCESS|API|ACCOUNT|SECRET)_KEY)(?:_ID)?$"
    r"|^FSSPEC_\w+_(?:KEY|SECRET|TOKEN|PASSWORD)$"
)
_LEAST_LENGTH = 6  # a shorter value may be any word
_HIDDEN = "***"


class _Parts(NamedTuple):
    """A URL without its credentials, and these: a user and password, and a query; '' for none."""

    bare: str
    user: str
    query: str


def redacted(text: str) -> str:
    """`text` without the credentials of the URLs in it, and without those that the environment holds."""
    secrets = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)]
    bare = text
    for match in _URL.finditer(text):
        parts = _parts(match)
        bare = bare.replace(match.group(), parts.bare + (f"?{_HIDDEN}" if parts.query else ""))
        # A storage library may quote them on their own.
        secrets += [parts.user, *parts.user.split(":", 1), parts.query, *re.split("[=&]", parts.query)[1::2]]
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= _LEAST_LENGTH:
            bare = bare.replace(secret, _HIDDEN)
    return bare


def without_credentials(path: str) -> str:
    """A path as it is; of a URL what tells where it is, without user, password and query."""
    match = _URL.fullmatch(path)
    return path if match is None else _parts(match).bare


def has_credentials(path: str) -> bool:
    """True if a URL has a password, or a query with something like a signature; of a web page also a user alone."""
    match = _URL.fullmatch(path)
    if match is None:
        return False
    parts = _parts(match)
    names = re.split("[=&]", parts.query)[::2]
    is_password = ":" in parts.user or (parts.user and match["scheme"] in _WEB)
    return bool(is_password) or any(_SECRET_PARAMETER.search(name) for name in names)


def _parts(match: re.Match[str]) -> _Parts:
    scheme, user, rest, query = match.group("scheme", "user", "rest", "query")
    user, query = user or "", query or ""
    if scheme in _NO_USER:
        rest, user = user + rest, ""
    if scheme not in _WEB and "=" not in query:  # a pattern, with a question mark for any character
        rest, query = rest + query, ""
    if scheme in _WEB:
        rest, _, fragment = rest.partition("#")
        query = query or fragment
    return _Parts(f"{scheme}://{rest}", user.removesuffix("@"), query.removeprefix("?"))
