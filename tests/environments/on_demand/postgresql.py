"""A real PostgreSQL server in a temporary folder, which tests can stop and start.

Run as a script, this file installs PostgreSQL by apt if the machine has none. If the user is root,
the server runs as the user `postgres`, because initdb refuses root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START_S = 30


class Server:
    """A PostgreSQL server. `url` is the storage to pass to Optuna, with a password that the server
    never checks.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rankaware-postgres-"))
        self.data, self.port = self.folder / "data", _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": []}
        options = ["-A", "trust", "-U", "tester", "--no-sync"]
        setup = [found("initdb"), "-D", str(self.data), *options]
        quiet = {"stdout": subprocess.DEVNULL, "cwd": self.folder}
        subprocess.run(setup, check=True, **quiet, **self._as)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://tester:a-secret@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        place = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        command = [found("postgres"), "-D", str(self.data), *place, "-F"]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stderr=subprocess.DEVNULL, **self._as
        )
        until = time.monotonic() + START_S
        while not self._answers():
            if time.monotonic() > until or self.process.poll() is not None:
                raise TimeoutError(f"PostgreSQL did not start within {START_S} s.")
            time.sleep(0.05)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", "")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Stop the server at once, even if clients are connected."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(START_S)
            self.process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)


def found(program: str) -> str:
    """Return the path of a PostgreSQL program, also from Debian's folder outside PATH."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places = [os.environ.get("PATH", ""), *map(str, homes)]
    path = shutil.which(program, path=os.pathsep.join(places))
    if path is None:
        raise FileNotFoundError(
            f"There is no {program}. Install PostgreSQL: apt-get install postgresql."
        )
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def install() -> None:
    """Install PostgreSQL by apt if it is missing, with sudo unless the user is root."""
    try:
        print(found("initdb"))
        return
    except FileNotFoundError:
        print("PostgreSQL is not installed. Installing it by apt.", file=sys.stderr)
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    command = apt if os.geteuid() == 0 else ["sudo", *apt]
    needed = ["--no-install-recommends", "postgresql"]
    for step in (["update", "-q"], ["install", "-y", "-q", *needed]):
        subprocess.run([*command, *step], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    install()
