"""Where a server listens, and who may use it: addresses and keys, judged before a model is loaded.

Whoever can reach another address than this machine's own needs a key. Keys come from a file or the
environment, and never by arguments, which everybody on a machine can list.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from megrez_gguf.errors import MegrezError

KEY_VARIABLE = "MEGREZ_API_KEY"

# All of it is handed on through a pipe, which holds this much everywhere.
_MOST_KEYS = 16 << 10


class ListeningError(MegrezError):
    """An address that cannot be listened on, or keys that cannot be used."""


def parse_hosts(text: str) -> tuple[str, ...]:
    """Addresses, names and paths of Unix sockets (`*.sock`), separated by commas."""
    hosts = tuple(filter(None, (host.strip() for host in text.split(","))))
    if not hosts:
        raise ListeningError("no host to listen on: give an address, or a path ending in .sock")
    return hosts


def is_local(hosts: tuple[str, ...]) -> bool:
    """Whether only this machine can reach all of `hosts`. Raises ListeningError: no such host."""
    return all(
        _is_socket(host)
        or all(ipaddress.ip_address(address[0]).is_loopback for _, address in _resolve(host, 0))
        for host in hosts
    )


def free_port(hosts: tuple[str, ...], port: int) -> int:
    """`port`, or a free one where it is 0, after a trial that it can be listened on.

    A Unix socket whose server is gone is removed. Raises ListeningError: it cannot be.
    """
    several = sum(not _is_socket(host) for host in hosts) > 1
    for host in hosts:
        if _is_socket(host):
            _clear_socket(Path(host))
        else:
            port = _try_port(host, port, several)
    return port


def urls(hosts: tuple[str, ...], port: int) -> list[str]:
    """How clients write the addresses."""
    return [_url(host, port) for host in hosts]


def read_keys(
    path: Path | None, environment: Mapping[str, str], say: Callable[[str], None]
) -> list[str]:
    """The keys in the file `path`, one a line, "-" being stdin; or the one of the environment.

    Empty lines and those that begin with # do not count. Raises ListeningError: no key, or none
    that a request could carry. Never shows a key.
    """
    if path is None:
        key = environment.get(KEY_VARIABLE)
        return [] if key is None else _checked([key], KEY_VARIABLE)
    if str(path) == "-":
        text, name = sys.stdin.read(_MOST_KEYS + 1), "stdin"
    else:
        text, name = _read_private(path, say), str(path)
    lines = [line.strip() for line in text.splitlines()]
    return _checked([line for line in lines if line and not line.startswith("#")], name)


def keys_for_child(keys: list[str]) -> Path:
    """A file that holds `keys`, for the program this process becomes, and for nobody else."""
    reader, writer = os.pipe()
    os.write(writer, "".join(f"{key}\n" for key in keys).encode("ascii"))
    os.close(writer)
    os.set_inheritable(reader, True)
    return Path(f"/dev/fd/{reader}")


def _read_private(path: Path, say: Callable[[str], None]) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MOST_KEYS + 1)
    except OSError as e:
        raise ListeningError(f"{path}: cannot read keys from it: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ListeningError(f"{path}: expected a text file with one key a line") from None
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        say(f"warning: everybody on this machine can read the keys in {path}: chmod 600 {path}")
    return text


def _checked(keys: list[str], source: str) -> list[str]:
    if not any(keys):
        raise ListeningError(f"{source} holds no key; a key is a line of text without spaces")
    for number, key in enumerate(keys, 1):
        if key.startswith("#") or not all("!" <= character <= "~" for character in key):
            raise ListeningError(
                f"{source}: key {number} cannot be used: expected letters, digits and punctuation "
                "of ASCII, no spaces, and no # at its beginning"
            )
    if sum(len(key) + 1 for key in keys) > _MOST_KEYS:
        raise ListeningError(f"{source}: more than {_MOST_KEYS} bytes of keys")
    return keys


def _url(host: str, port: int) -> str:
    if _is_socket(host):
        return f"unix:{host}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_socket(host: str) -> bool:
    return host.endswith(".sock")


def _resolve(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise ListeningError(
            f"--host {host}: expected an IP address or a name of this machine, without port or "
            "http://, or a path ending in .sock"
        ) from None
    return [(family, (str(address[0]), int(address[1]))) for family, _, _, _, address in found]


def _try_port(host: str, port: int, several: bool) -> int:
    reason: OSError | None = None
    for family, address in _resolve(host, port):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(several))
                trial.bind(address)
                trial.listen()
                return int(trial.getsockname()[1])
        except OSError as e:
            reason = e
    assert reason is not None
    raise ListeningError(f"cannot listen on {host}, port {port}: {_explained(reason)}")


def _explained(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program does. Give another --port; 0 takes a free one"
    if error.errno == errno.EACCES:
        return "this user may not use so low a port. Give a --port from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    return os.strerror(error.errno or 0)


def _clear_socket(path: Path) -> None:
    """Remove the Unix socket `path` if nobody listens on it, or raise ListeningError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
            trial.connect(str(path))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ListeningError(f"cannot listen on {path}: no such folder") from None
    except ConnectionRefusedError:
        if not path.is_socket():
            raise ListeningError(f"cannot listen on {path}: it is there, and no socket") from None
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    except OSError as e:
        raise ListeningError(f"cannot listen on {path}: {e.strerror or e}") from None
    else:
        raise ListeningError(f"cannot listen on {path}: another program does")
