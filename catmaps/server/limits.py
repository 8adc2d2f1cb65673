"""What the server refuses, and how it says so."""

from dataclasses import dataclass

LONGEST = 400
"""Characters of a message."""


class ApiError(Exception):
    """A request that is answered with an error, in the form of OpenAI's API."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."  # it may quote the request

    def as_dict(self) -> dict[str, dict[str, str | None]]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that is taken on."""

    tokens: int = 1024
    """Tokens to write, of one text."""
    choices: int = 64
    """Texts of one request: prompts times n."""
    steps: int = 256
    """Steps of a sampler."""
    rows: int = 256
    """Texts of all requests that are being written or wait; beyond it 429."""
    seconds: float = 60.0
    """From a request to its answer; beyond it 503."""
    body: int = 1 << 18
    """Bytes of a request; beyond it 413."""
    batch: int = 32
    """Texts drawn together."""
