"""A SLURM cluster of three nodes that are all this machine, without systemd or a database."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rondo.launch.ranks import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
NODES = ("n1", "n2", "n3")
_CONFIGURATION = """\
ClusterName=rondo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# How long a requeued job waits, besides: two minutes unless said otherwise.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# Neither control groups nor affinity: containers seldom allow them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=15
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """The daemons, from the start of a `with` block to its end.

    `environment` makes SLURM's commands talk to them.
    """

    def __enter__(self) -> Cluster:
        # Paths of sockets are short, so pytest's own folders will not do.
        self.folder = Path(tempfile.mkdtemp(prefix="rondo-slurm-", dir="/tmp"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._write_configuration()
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            self.run("scancel", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, check: bool = True) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def _write_configuration(self) -> None:
        host = socket.gethostname()
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(256))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 "
            "Gres=gpu:1"
            for node in NODES
        ]
        text = _CONFIGURATION.format(
            host=host,
            port=free_port(),
            user=getpass.getuser(),
            folder=self.folder,
            nodes=",".join(NODES),
        )
        (self.folder / "slurm.conf").write_text(text + "\n".join(lines) + "\n")

    def _start_daemons(self) -> None:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        munge = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *munge)
        self._wait("munged", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self._start("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        idle = ["idle"] * len(NODES)
        self._wait(
            "nodes", lambda: self.run("sinfo", "-h", "-N", "-o%T", check=False).split() == idle
        )

    def _start(self, *words: str) -> None:
        log = (self.folder / f"{words[0]}.out").open("ab")
        self._daemons.append(
            subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        )

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not ready():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-1000:] for path in self.folder.glob("*.log")]
                raise AssertionError(f"{what}: not ready after 30 s\n" + "\n".join(logs))
            time.sleep(0.1)
