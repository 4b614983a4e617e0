"""Which of some hosts this machine is, and by which address and interface it reaches the first.

    python launch/_network.py HOST[,HOST...] [--node-rank R | --any]

prints three lines: the rank of this machine among the hosts (-1 if it is none of them, with --any),
its own address towards the first one, and the interface with that address. It needs Linux, and
nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import fcntl
import socket
import struct
import sys
from collections.abc import Sequence

# Of <linux/sockios.h>: asks for the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915
# Any port will do: no packet is sent.
_PORT = 29400


class NetworkError(RuntimeError):
    """The hosts do not resolve, or this machine is not one of them (the message names the fix)."""


def address_of(host: str) -> tuple[socket.AddressFamily, str]:
    """The first address of a host, IPv4 if it has one."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise NetworkError(
            f"found no address of the host '{host}' ({error.strerror}); expected a name that every "
            "machine can resolve. Use addresses, or correct the list of hosts"
        ) from None
    families = {entry[0]: str(entry[4][0]) for entry in reversed(found)}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return family, families[family]


def is_own(host: str) -> bool:
    """Whether the host's address is one of this machine's."""
    family, address = address_of(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_address_towards(host: str) -> str:
    """The address of this machine on the route to a host."""
    family, address = address_of(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _PORT))
        except OSError as error:
            raise NetworkError(
                f"found no route to '{host}' at {address} ({error.strerror}); expected to reach it"
            ) from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has an address; empty if it is not known."""
    if ":" in address:
        return _interface_of_ipv6(address)
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def _interface_of_ipv6(address: str) -> str:
    digits = socket.inet_pton(socket.AF_INET6, address.split("%")[0]).hex()
    with open("/proc/net/if_inet6") as table:
        for line in table:
            fields = line.split()
            if fields[0] == digits:
                return fields[-1]
    return ""


def rank_among(hosts: Sequence[str], *, any_machine: bool = False) -> int:
    """The position of this machine; -1 if it is none of the hosts and need not be.

    Raises:
        NetworkError: It is none of the hosts, or several.
    """
    own = [rank for rank, host in enumerate(hosts) if is_own(host)]
    if any_machine and not own:
        return -1
    if len(own) == 1:
        return own[0]
    found = "none" if not own else f"{len(own)}"
    raise NetworkError(
        f"found this machine ({socket.gethostname()}) to be {found} of the hosts "
        f"{','.join(hosts)}; expected one. Correct the list, or pass --node-rank"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what the launchers need to know."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hosts", help="names or addresses, the first one for the rendezvous")
    rank_known = parser.add_mutually_exclusive_group()
    rank_known.add_argument("--node-rank", type=int, help="the rank, if it is known")
    rank_known.add_argument("--any", action="store_true", help="this may be another machine")
    args = parser.parse_args(arguments)
    hosts = args.hosts.split(",")
    try:
        rank = args.node_rank
        if rank is None:
            rank = rank_among(hosts, any_machine=args.any)
        elif not 0 <= rank < len(hosts):
            raise NetworkError(
                f"found the node rank {rank} with {len(hosts)} hosts; expected 0 to "
                f"{len(hosts) - 1}"
            )
        # The first host speaks from the address under which the others know it.
        own = address_of(hosts[0])[1] if rank == 0 else own_address_towards(hosts[0])
    except NetworkError as error:
        sys.exit(f"error: {error}")
    print(rank, own, interface_of(own), sep="\n")


if __name__ == "__main__":
    main()
