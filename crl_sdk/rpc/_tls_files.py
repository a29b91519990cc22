"""PEM files of TLS, checked before gRPC reads them. It would fail later, or end the process."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from crl_sdk.errors import InvalidInputError

PemPath = str | os.PathLike[str]


def read_pair(certificate: PemPath, key: PemPath, names: tuple[str, str]) -> tuple[bytes, bytes]:
    """Read a certificate chain and its private key.

    Args:
        certificate: Path of the chain.
        key: Path of the key.
        names: What the user calls the two paths, for the error messages.

    Raises:
        InvalidInputError: If a file cannot be read or is not PEM, or the key does not belong to the
            certificate.
    """
    chain, secret = _read_pem(certificate, names[0]), _read_pem(key, names[1])
    if b"PRIVATE KEY-----" in chain and b"BEGIN CERTIFICATE-----" in secret:
        raise InvalidInputError(
            f"{certificate} holds the key and {key} the certificate: swap {names[0]} and {names[1]}"
        )
    try:
        # a password, so that OpenSSL does not ask for one in the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidInputError(
            f"{certificate} and {key}: not a certificate and its private key, without a password "
            f"({getattr(error, 'reason', None) or 'not readable'}); check {names[0]} and {names[1]}"
        ) from error
    return chain, secret


def read_authority(path: PemPath, name: str) -> bytes:
    """Read the certificates of an authority.

    Args:
        path: Path of the file.
        name: What the user calls the path, for the error message.

    Raises:
        InvalidInputError: If the file cannot be read or holds no certificate.
    """
    data = _read_pem(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        reason = error.reason or "not readable"
        raise InvalidInputError(
            f"{path}: expected the certificate of an authority ({reason}); check {name}"
        ) from error
    return data


def read_system_authorities(name: str) -> bytes:
    """Return the certificates of the authorities that this machine trusts, as PEM.

    Args:
        name: What the user calls the choice of authorities, for the error message.

    Raises:
        InvalidInputError: If there are none.
    """
    context = ssl.create_default_context()
    folder = ssl.get_default_verify_paths().capath
    for path in Path(folder).iterdir() if folder else ():  # OpenSSL reads these when it needs them
        try:
            context.load_verify_locations(path)
        except (ssl.SSLError, OSError):  # not a certificate
            continue
    trusted = context.get_ca_certs(binary_form=True)
    if not trusted:
        raise InvalidInputError(
            f"this machine trusts no authority that can be read: set {name} to a PEM file"
        )
    return "".join(map(ssl.DER_cert_to_PEM_cert, trusted)).encode()


def _read_pem(path: PemPath, name: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}); check {name}"
        ) from error
    if b"-----BEGIN " not in data:
        raise InvalidInputError(f"{path}: expected a PEM file; check {name}")
    return data
