"""What the Hub refuses, in words that say what to do, and never with a token in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_lowbit.errors import BadRequest, LowBitError

AFTER = "Nothing was published."
AGAIN = "Push again: what has arrived is not sent again."
REMEDIES = {
    401: "The Hub knows no such user: log in with `hf auth login`, or set HF_TOKEN to a token with write permission.",
    403: "The token may not write there: check the name of the repository, and that the token has write permission for it.",
    404: "There is no such repository or user, or the token may not see it: check the name.",
    409: f"Someone else changed the repository meanwhile. {AGAIN}",
    412: f"Someone else changed the repository meanwhile. {AGAIN}",
    429: f"Too many requests. Wait a little. {AGAIN}",
}
NO_ROOM = "There is no room for it: delete files there or raise the quota, then push again."
ROOM = {402, 413, 507}


@contextmanager
def in_plain_words(repo_id: str, token: str | bool | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into our errors.

    The original is not chained: its text is the server's, which may repeat what it was sent.

    Raises:
        BadRequest: this user may not do that: 401, 403, 404, a card the Hub does not accept, or the offline mode is on.
        LowBitError: the server or the connection failed, or there is no room.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport: Any = HfHubHTTPError.__mro__[1]  # the HTTP library's own base class, whichever that is
    problem: LowBitError
    try:
        yield
        return
    except LowBitError:
        raise
    except OfflineModeIsEnabled:
        problem = BadRequest(f"cannot push to {repo_id!r}: HF_HUB_OFFLINE is set. Unset it. {AFTER}")
    except (transport, OSError, RuntimeError, ValueError) as error:
        secret = token if isinstance(token, str) else get_token()
        refusal = _cause(error, HfHubHTTPError)  # an upload's thread wraps it
        if refusal is not None:
            said = refusal.server_message or str(refusal)
            problem = _refused(repo_id, refusal.response.status_code, _line(said, secret))
        elif isinstance(error, ValueError):
            problem = BadRequest(f"cannot push to {repo_id!r}: {_line(str(error), secret)}. {AFTER}")
        else:
            kind = f"{type(error).__name__}: {_line(str(error), secret)}"
            problem = LowBitError(f"the connection broke while pushing to {repo_id!r} ({kind}). {AFTER} {AGAIN}")
    raise problem from None


def _cause(error: BaseException | None, kind: type) -> Any:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _refused(repo_id: str, status: int, said: str) -> LowBitError:
    full = status in ROOM or (status == 403 and re.search("storage|quota", said, re.IGNORECASE))
    if full:
        remedy = NO_ROOM
    elif status >= 500:
        remedy = f"The Hub is in trouble, not your files. {AGAIN}"
    else:
        remedy = REMEDIES.get(status, "")
    kind = BadRequest if status in (400, 401, 403, 404) and not full else LowBitError
    return kind(f"pushing to {repo_id!r} was refused with {status} ({said}). {remedy} {AFTER}".replace("  ", " "))


def _line(text: str, secret: str | None) -> str:
    """One short line without a token."""
    for known in {secret, os.environ.get("HF_TOKEN")}:
        if known:
            text = text.replace(known, "***")
    return " ".join(re.sub(r"hf_\w{12,}|(?<=Bearer )\S+", "***", text).split())[:300]
