"""What URLs carry beside the address, names with passwords and the signatures behind a question mark, is a secret: it
stands in no finished directory, message or log line of ours. Whoever reads an archive by such a URL gives it anew.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode

_URL = re.compile(
    r"""([a-z][a-z0-9+.-]*://)([^\s/?#'"<>]*@)?((?:(?![a-z][a-z0-9+.-]*://)[^\s?#'"<>])*)(\?[^\s#'"<>]*)?""",
    re.IGNORECASE,
)
_UNSAFE = re.compile(r"""[\s'"<>]""")
_VERSIONS = ("versionId", "generation")  # of S3 and of Google: which content is meant
_WEB = ("http://", "https://")


def without_secrets(text: str) -> str:
    """The text, its URLs without passwords; those of the web without names and whatever follows a question mark too,
    but for the version of an object.
    """
    return _URL.sub(_address, text) if "://" in text else text


def hides_a_secret(url: str) -> bool:
    """Whether `without_secrets` would not see where the address ends: of the web, with a password or a question mark,
    and with a letter that is a part of it only when it is percent-encoded.
    """
    return any(name in url.lower() for name in _WEB) and bool(set("?@") & set(url)) and bool(_UNSAFE.search(url))


def without_secrets_in(value: Any) -> Any:
    """A JSON value, with all its strings as `without_secrets` gives them."""
    if isinstance(value, dict):
        return {name: without_secrets_in(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets_in(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def _address(url: re.Match[str]) -> str:
    protocol, user, address, query = url[1], url[2] or "", url[3], url[4] or ""
    if protocol.lower() not in _WEB:
        return protocol + re.sub(":.*@", "@", user) + address + query
    kept = urlencode([(name, value) for name, value in parse_qsl(query[1:]) if name in _VERSIONS])
    return protocol + address + (f"?{kept}" if kept else "")
