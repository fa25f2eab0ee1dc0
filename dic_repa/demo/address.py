"""Where the page listens. Needs neither Gradio nor torch, so that a port in use is said at once."""

import contextlib
import errno
import socket

from dic_repa.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; a UserError names a free port if this one is taken."""
    try:
        return _listen(host, port)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; name an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use; take another, such as --port {free_port(host, port)}") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs more rights; take one above 1023, such as --port 7860") from None
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}; name another --host") from None


def free_port(host: str, port: int) -> int:
    """A free port, the next behind `port` if there is one among the next hundred."""
    for candidate in [*range(port + 1, min(port + 100, 65536)), 0]:
        with contextlib.suppress(OSError), _listen(host, candidate) as found:
            return found.getsockname()[1]
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of one that has just ended is free
        listening.bind(address)
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening
