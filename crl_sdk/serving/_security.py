"""Who may call: TLS from files, bearer tokens with rights, checked before a message is read."""

from __future__ import annotations

import hmac
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import grpc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from crl_sdk.errors import AccessError, InvalidInputError
from crl_sdk.rpc._status import error_trailers
from crl_sdk.serving._calls import REQUEST_ID_KEY, request_id
from crl_sdk.serving._handlers import in_place_of

Right: TypeAlias = Literal["embed", "bases"]
RIGHTS: tuple[Right, ...] = get_args(Right)
MIN_TOKEN = 16

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_CHANGES = frozenset(
    f"/crl.v1.BasisService/{name}" for name in ("PutBasis", "DeleteBasis", "GenerateBasis")
)
_OPEN = (  # probes carry no tokens
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files of a server's TLS, in PEM.

    Attributes:
        certificate: its chain.
        key: its private key.
        client_authority: if given, clients must show a certificate that this authority signed.
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files.

        Raises:
            InvalidInputError: one cannot be read or holds no PEM.
        """
        key, certificate = _pem(self.key), _pem(self.certificate)
        authority = None if self.client_authority is None else _pem(self.client_authority)
        return grpc.ssl_server_credentials(
            [(key, certificate)], authority, require_client_auth=authority is not None
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A secret with a name for the log and what it allows."""

    name: str
    secret: str
    rights: frozenset[Right]


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read tokens from a TOML file: a table per token, with `token` and `rights`.

    Raises:
        InvalidInputError: the file cannot be read, is not such a file, or holds a short token.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError(f"{path}: not a TOML file of tokens ({error})") from error
    tokens = []
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != {"token", "rights"}:
            raise InvalidInputError(
                f'{path}: expected [{name}] with token = "…" and rights = ["embed", "bases"]'
            )
        secret, rights = table["token"], table["rights"]
        if not isinstance(secret, str) or len(secret) < MIN_TOKEN or not secret.isascii():
            raise InvalidInputError(
                f"{path}: the token of [{name}] must be {MIN_TOKEN} ASCII characters or more"
            )
        if not isinstance(rights, list) or not rights or not set(rights) <= set(RIGHTS):
            raise InvalidInputError(f"{path}: expected rights of [{name}] from {list(RIGHTS)}")
        tokens.append(Token(name, secret, frozenset(rights)))
    if not tokens:
        raise InvalidInputError(f"{path}: holds no tokens")
    return tuple(tokens)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token that has the right they need; health is open to all."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        """Store the tokens."""
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # the stubs promise a handler, gRPC itself gives None for unknown methods
        """Let a call through, or end it with UNAUTHENTICATED or PERMISSION_DENIED."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(_OPEN):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        code, message = self._judge(method, metadata)
        return handler if code is None else _refusing(handler, code, message)

    def _judge(
        self, method: str, metadata: Mapping[str, str | bytes]
    ) -> tuple[grpc.StatusCode | None, str]:
        header = metadata.get("authorization", "")
        scheme, _, given = header.partition(" ") if isinstance(header, str) else ("", "", "")
        if scheme.lower() != "bearer" or not given:
            return grpc.StatusCode.UNAUTHENTICATED, (
                "expected the metadata `authorization: Bearer TOKEN`, got none"
            )
        # all are compared, each in constant time, so that timing tells nothing
        matches = [
            token
            for token in self._tokens
            if hmac.compare_digest(token.secret.encode(), given.encode("utf-8", "replace"))
        ]
        if not matches:
            return grpc.StatusCode.UNAUTHENTICATED, "the token is not known here"
        needed: Right = "bases" if method in _CHANGES else "embed"
        if needed not in matches[0].rights:
            return grpc.StatusCode.PERMISSION_DENIED, (
                f"the token {matches[0].name!r} lacks the right {needed!r} that {method} needs"
            )
        return None, ""


def _refusing(handler: Handler, code: grpc.StatusCode, message: str) -> Any:
    """Give a handler of the same kind that ends every call at once."""
    trailers = error_trailers(AccessError(message))

    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(code, message, (*trailers, (REQUEST_ID_KEY, request_id.get())))

    async def refuse_stream(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await refuse(_, context)
        yield None

    return in_place_of(handler, refuse, refuse_stream)


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror})") from error
    if b"-----BEGIN " not in data:
        raise InvalidInputError(f"{path}: expected a PEM file")
    return data
