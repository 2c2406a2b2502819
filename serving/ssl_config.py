"""Writes TF Serving's TLS file from PEM files, since it holds the PEM text itself.

`python -m serving.ssl_config ssl.config --key server.key --cert server.crt [--client_ca ca.crt]`
"""

from __future__ import annotations

import argparse
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving import config_files
from serving.server.config import ConfigError
from serving.server.protos import SSLConfig


def make(key: Path, cert: Path, client_ca: Path | None = None) -> Any:
    """Builds an SSLConfig.

    Args:
      key: The server's private key, PEM, without a password.
      cert: The server's certificate and what leads to its authority, PEM.
      client_ca: The authority of the clients' certificates, PEM; with it, clients must have one.

    Raises:
      ConfigError: A file cannot be read, or key and certificate do not belong together.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=_refuse_password)
        if client_ca:
            context.load_verify_locations(client_ca)
        return SSLConfig(
            server_key=key.read_text(),
            server_cert=cert.read_text(),
            custom_ca=client_ca.read_text() if client_ca else "",
            client_verify=client_ca is not None,
        )
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = ", ".join(str(path) for path in (key, cert, client_ca) if path)
        raise ConfigError(f"cannot use {files}: {error}.") from error


def _refuse_password() -> str:
    raise ValueError("the key is encrypted, and TF Serving has no way to ask for its password")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with code 2 and a message where a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m serving.ssl_config", description=__doc__)
    parser.add_argument("config", type=Path, help="the file to write, readable by its owner alone")
    parser.add_argument("--key", type=Path, required=True, help="the server's private key, PEM")
    parser.add_argument("--cert", type=Path, required=True, help="its certificate chain, PEM")
    parser.add_argument(
        "--client_ca", type=Path, help="demand clients' certificates, signed by this authority"
    )
    args = parser.parse_args(arguments)
    try:
        config_files.write(make(args.key, args.cert, args.client_ca), args.config, mode=0o600)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
