"""Who may call the server: TLS from files, and bearer tokens with rights.

Tokens are checked before the server reads a message.
"""

from __future__ import annotations

import hmac
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from crl_sdk.errors import AccessError, InvalidInputError
from crl_sdk.rpc._status import error_trailers
from crl_sdk.rpc._tls_files import read_authority, read_pair
from crl_sdk.serving._call_interceptor import REQUEST_ID_KEY, request_id
from crl_sdk.serving._method_handlers import replace_behavior
from crl_sdk.serving._rights import RIGHTS, RPC_ACCESS, Right

MIN_TOKEN_LENGTH = 16

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Files of a server's TLS, in PEM format.

    Attributes:
        certificate: Path of the server's certificate chain.
        key: Path of the server's private key.
        client_authority: Path of an authority's certificate. If it is set, each client must show a
            certificate that this authority signed (mutual TLS).
    """

    certificate: Path
    key: Path
    client_authority: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Read the files.

        Raises:
            InvalidInputError: If a file cannot be read or is not what it should be, or the key does
                not belong to the certificate.
        """
        certificate, key = read_pair(self.certificate, self.key, ("--tls-cert", "--tls-key"))
        authority = None
        if self.client_authority is not None:
            authority = read_authority(self.client_authority, "--tls-client-ca")
        return grpc.ssl_server_credentials(
            [(key, certificate)], authority, require_client_auth=authority is not None
        )


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token.

    Attributes:
        name: Name of its holder, used in messages and logs.
        secret: Text that the holder sends.
        rights: What the holder may do.
    """

    name: str
    secret: str
    rights: frozenset[Right]


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read tokens from a TOML file with one table per token, each with `token` and `rights`.

    Raises:
        InvalidInputError: If the file cannot be read, has another form, or holds a short token.
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
        sendable = isinstance(secret, str) and secret.isascii() and secret.isprintable()
        if not sendable or len(secret) < MIN_TOKEN_LENGTH:
            raise InvalidInputError(
                f"{path}: the token of [{name}] must have at least {MIN_TOKEN_LENGTH} characters, "
                "all of them printable ASCII"
            )
        if not isinstance(rights, list) or not rights or not set(rights) <= set(RIGHTS):
            raise InvalidInputError(f"{path}: expected rights of [{name}] from {list(RIGHTS)}")
        tokens.append(Token(name, secret, frozenset(rights)))
    if not tokens:
        raise InvalidInputError(
            f'{path}: holds no tokens; add a table such as [camera] with token = "…" and '
            'rights = ["embed"]'
        )
    return tuple(tokens)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls whose token lacks the right that `RPC_ACCESS` declares for the RPC."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        """Store the tokens."""
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # gRPC returns None for unknown methods, which its type stubs do not say
        """Let a call through, or end it with UNAUTHENTICATED or PERMISSION_DENIED."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or RPC_ACCESS.get(method) == "public":
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        refusal = self._refusal(method, metadata)
        return handler if refusal is None else _refusing_handler(handler, *refusal)

    def _refusal(
        self, method: str, metadata: Mapping[str, str | bytes]
    ) -> tuple[grpc.StatusCode, str] | None:
        """Return the status that ends the call, or None if the call is allowed."""
        header = metadata.get("authorization", "")
        scheme, _, secret = header.partition(" ") if isinstance(header, str) else ("", "", "")
        if scheme.lower() != "bearer" or not secret:
            return grpc.StatusCode.UNAUTHENTICATED, (
                "expected the metadata `authorization: Bearer TOKEN`, got none; ask the operator "
                "of this server for a token"
            )
        # Compare with every token, each in constant time, so that the time reveals nothing.
        matches = [
            token
            for token in self._tokens
            if hmac.compare_digest(token.secret.encode(), secret.encode("utf-8", "replace"))
        ]
        if not matches:
            return grpc.StatusCode.UNAUTHENTICATED, (
                "the token is not known here; ask the operator of this server for a valid one"
            )
        needed = RPC_ACCESS.get(method)
        if needed is None:
            return grpc.StatusCode.PERMISSION_DENIED, (
                f"this server declares no right for {method}, so it refuses every call of it; "
                "declare one in crl_sdk/serving/_rights.py"
            )
        if needed not in matches[0].rights:
            return grpc.StatusCode.PERMISSION_DENIED, (
                f"the token {matches[0].name!r} lacks the right {needed!r} that {method} needs; "
                "ask the operator of this server for it"
            )
        return None


def _refusing_handler(handler: Handler, code: grpc.StatusCode, message: str) -> Any:
    """Return a handler of the same kind that ends every call with a status."""
    trailers = error_trailers(AccessError(message))

    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(code, message, (*trailers, (REQUEST_ID_KEY, request_id.get())))

    async def refuse_stream(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await refuse(_, context)
        yield None  # makes this function a generator; it is never reached

    return replace_behavior(handler, refuse, refuse_stream)
