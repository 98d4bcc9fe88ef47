"""Networks of hosts: network namespaces of their own, or loopback addresses where these cannot be made.

Nothing of a network is outside its namespaces. A namespace lives as long as a process of this one holds it,
so the network is gone when this process has ended, in any way.
"""

from __future__ import annotations

import functools
import random
import shutil
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod

from mongo_proxy import Proxy

#: The delay of a slow link, in seconds, and the part of its packets that are lost.
DELAY, LOSS = 0.03, 0.02
#: Seconds after which TCP sends a lost packet again, at least.
_AGAIN = 0.2
_NETWORK = "10.77.0"
_TOOLS = ("ip", "nsenter", "unshare")
_HOLD = "ip link set lo up && echo up && exec cat"  # it ends when its standard input ends
_LISTEN = """
import socket, sys
theirs = socket.socket(fileno=int(sys.argv[1]))
listener = socket.create_server((sys.argv[2], 0))
socket.send_fds(theirs, [b"0"], [listener.fileno()])
"""
_never = threading.Event()


class Host:
    """A host, and its link to the server.

    Attributes:
        command: the beginning of the command line of a program that runs on this host.
        address: the address and the port at which its programs reach the server.
    """

    command: tuple[str, ...] = ()

    def __init__(self, target: int, listener: socket.socket) -> None:
        self.proxy = Proxy(target, listener)
        self.address = "{}:{}".format(*listener.getsockname())

    def cut(self) -> None:
        """Lose all packets from now on, without a word to either side."""
        self.proxy.judge = lambda direction, piece: False

    def mend(self) -> None:
        """Let packets through again."""
        self.proxy.heal()

    def slow(self) -> str:
        """Make the link slow. Return how the packets are delayed and lost."""
        chance = random.Random(77)

        def judge(direction: str, piece: bytes) -> bool:
            return not _never.wait(DELAY + _AGAIN * (chance.random() < LOSS))

        self.proxy.judge = judge
        return "a proxy"


class _Namespace:
    """A network namespace, and the process that holds it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", _HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != b"up\n":
            self.close()
            raise OSError("a network namespace cannot be made")
        self.command = ("nsenter", f"--net=/proc/{self.process.pid}/ns/net")

    def run(self, *command: str) -> None:
        subprocess.run([*self.command, *command], check=True, capture_output=True)

    def listen(self, address: str) -> socket.socket:
        """Return a socket that listens in this namespace."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            number = str(theirs.fileno())
            subprocess.run(
                [*self.command, sys.executable, "-I", "-S", "-c", _LISTEN, number, address],
                pass_fds=[theirs.fileno()],
                check=True,
            )
            _, [listener], *_ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=listener)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class _Apart(Host):
    """A host in a network namespace of its own, with a cable to the switch."""

    def __init__(self, target: int, switch: _Namespace, number: int) -> None:
        super().__init__(target, switch.listen(f"{_NETWORK}.1"))
        self._switch, self._namespace = switch, _Namespace()
        self._port = f"port{number}"
        self.command = self._namespace.command
        self.holder = self._namespace.process.pid
        add = ("ip", "link", "add", "name", self._port, "type", "veth")
        switch.run(*add, "peer", "name", "eth0", "netns", str(self.holder))
        switch.run("ip", "link", "set", self._port, "master", "bridge", "up")
        self._namespace.run("ip", "address", "add", f"{_NETWORK}.{1 + number}/24", "dev", "eth0")
        self._namespace.run("ip", "link", "set", "eth0", "up")

    def cut(self) -> None:
        self._switch.run("ip", "link", "set", self._port, "down")

    def mend(self) -> None:
        self._switch.run("ip", "link", "set", self._port, "up")

    def slow(self) -> str:
        if no_netem():
            return super().slow()
        held = ("delay", f"{1000 * DELAY:g}ms", "5ms", "loss", f"{100 * LOSS:g}%")
        for namespace, device in ((self._namespace, "eth0"), (self._switch, self._port)):
            namespace.run("tc", "qdisc", "add", "dev", device, "root", "netem", *held)
        return "netem"

    def close(self) -> None:
        self._namespace.close()


class Network(ABC):
    """Hosts with links to a server on a port of this machine.

    Attributes:
        hosts: the hosts.
    """

    def __init__(self) -> None:
        self.hosts: list[Host] = []

    @abstractmethod
    def add(self, target: int) -> Host:
        """Add a host that reaches the server on the port ``target``."""

    def close(self) -> None:
        """Remove all hosts; their programs must have ended."""
        for host in self.hosts:
            host.proxy.close()


class Loopback(Network):
    """Hosts that reach the server at loopback addresses of their own."""

    def add(self, target: int) -> Host:
        address = f"127.77.0.{2 + len(self.hosts)}"
        host = Host(target, socket.create_server((address, 0)))
        self.hosts.append(host)
        return host


class Namespaces(Network):
    """Hosts in network namespaces, on one switch: a bridge in a namespace of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._switch = _Namespace()
        self._apart: list[_Apart] = []
        self._switch.run("ip", "link", "add", "name", "bridge", "type", "bridge")
        self._switch.run("ip", "address", "add", f"{_NETWORK}.1/24", "dev", "bridge")
        self._switch.run("ip", "link", "set", "bridge", "up")

    @property
    def holders(self) -> list[int]:
        """The ids of the processes that hold the namespaces."""
        return [self._switch.process.pid, *(host.holder for host in self._apart)]

    def add(self, target: int) -> Host:
        host = _Apart(target, self._switch, 1 + len(self.hosts))
        self._apart.append(host)
        self.hosts.append(host)
        return host

    def close(self) -> None:
        super().close()
        for host in self._apart:
            host.close()
        self._switch.close()


@functools.cache
def missing() -> str:
    """Return why network namespaces cannot be made here; empty if they can."""
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(absent)}"
    cables = "ip link add name a type veth peer name b && ip link add name c type bridge"
    return _refused("sh", "-c", cables)


@functools.cache
def no_netem() -> str:
    """Return why links cannot delay and lose packets here (``tc netem``); empty if they can."""
    if missing() or shutil.which("tc") is None:
        return missing() or "there is no tc"
    return _refused("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")


def _refused(*command: str) -> str:
    """Return what a command in a new network namespace complains about; empty if it is successful."""
    ran = subprocess.run(
        ["unshare", "--net", *command], capture_output=True, text=True, check=False
    )
    return "" if ran.returncode == 0 else ran.stderr.strip() or f"{command[0]} failed"
