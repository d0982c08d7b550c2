"""Runs a command as several processes of one machine that end together.

    moe-tf-launch --num_processes=2 -- moe-tf-lm --config=... --workdir=...

Each process gets its place in the cluster through `TF_CONFIG`, as on several
machines: the addresses of all processes, and its own index. The output of
process 0 is passed through unchanged, and so is its input unless that is a
terminal. The output of the other processes goes to stderr, each line after the
process's index, such as `[1] `.

When a process fails, the others get SIGTERM, and `moe-tf-launch` ends with the
exit code of the first failure (128 + n for signal n). A process that ends with
0 leaves the others running. SIGINT (Ctrl-C), SIGTERM and SIGHUP are passed on
to all processes. A process that still runs `--grace_seconds` after its signal,
or at the next signal, is killed (SIGKILL). So are processes that an ended
process has left in its process group. On Linux the processes die with the
launcher even if the launcher is killed; processes that they started may not.

Free ports are found by trying. If another program takes a port before the
process does, that process cannot start its server, and all processes end. Run
the command again then, or choose the ports with `--port`.
"""

import contextlib
import ctypes
import functools
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from absl import app
from absl import flags

_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes to start.", 1
)
_DEVICES_PER_PROCESS = flags.DEFINE_integer(
    "devices_per_process",
    None,
    "Devices of a process, passed on as MOE_TF_DEVICES_PER_PROCESS. Each "
    "process gets so many GPUs of its own through CUDA_VISIBLE_DEVICES, unless "
    "that is set to none. Without GPUs the devices are virtual CPUs.",
    1,
)
_PORT = flags.DEFINE_integer(
    "port", 0, "Port of process 0; the others follow. 0: any free ports.", 0
)
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds", 30.0, "Seconds from a signal to end until SIGKILL.", 0
)

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and others signal a process and then its group: one signal.
_ONE_SIGNAL_SECONDS = 1.0
# Below the range of ports for outgoing connections. In that range a client that
# connects to a port may be given that very port, which blocks the server.
_ANY_PORT = range(10_000, 32_768)
_LONGEST_LINE = 2**16
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_ports(count: int, first: int = 0) -> list[int]:
    """Finds ports on which no program listens.

    Args:
        count: int, the number of ports.
        first: int, the first of consecutive ports; 0 for any free ports.

    Raises:
        ValueError: a given port is in use, or too few ports are free.
    """
    if first + count - 1 > 65_535:
        raise ValueError(f"--port={first} leaves no {count} ports up to 65535.")
    candidates = range(first, first + count)
    if not first:
        candidates = random.sample(_ANY_PORT, len(_ANY_PORT))
    ports = []
    for port in candidates:
        if len(ports) == count:
            break
        # As a server binds: on all interfaces, in spite of old connections.
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("", port))
            except OSError as error:
                if first:
                    raise ValueError(
                        f"--port={first}: port {port} cannot be had: "
                        f"{error.strerror}. --port=0 finds free ones."
                    ) from None
            else:
                ports.append(port)
    if len(ports) < count:
        raise ValueError(f"Fewer than {count} ports are free.")
    return ports


def own_gpus(
    index: int, num_processes: int, per_process: int, visible: str | None
) -> str:
    """Returns the value of `CUDA_VISIBLE_DEVICES` for a process.

    Args:
        index: int, index of the process.
        num_processes: int
        per_process: int, GPUs of each process.
        visible: the launcher's value of the variable; None if it is not set.

    Raises:
        ValueError: `visible` names too few GPUs.
    """
    first, end = index * per_process, (index + 1) * per_process
    if visible is None:  # All GPUs; harmless where there are none.
        return ",".join(map(str, range(first, end)))
    names = [name.strip() for name in visible.split(",")]
    if names[0] in ("", "-1"):  # None, by choice.
        return visible
    if len(names) < num_processes * per_process:
        raise ValueError(
            f"{num_processes} processes with "
            f"--devices_per_process={per_process} need "
            f"{num_processes * per_process} GPUs. "
            f"Received: CUDA_VISIBLE_DEVICES={visible}"
        )
    return ",".join(names[first:end])


def environments(
    ports: list[int],
    devices_per_process: int | None,
    environment: Mapping[str, str],
) -> list[dict[str, str]]:
    """Returns each process's environment, with its place in the cluster."""
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    places = []
    for index in range(len(ports)):
        task = {"type": "worker", "index": index}
        place = {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}
        if devices_per_process:
            place["MOE_TF_DEVICES_PER_PROCESS"] = str(devices_per_process)
            place["CUDA_VISIBLE_DEVICES"] = own_gpus(
                index,
                len(ports),
                devices_per_process,
                environment.get("CUDA_VISIBLE_DEVICES"),
            )
        places.append({**environment, **place})
    return places


def _write(data):
    with contextlib.suppress(OSError):  # The run goes on if nobody reads.
        while data:
            data = data[os.write(sys.stderr.fileno(), data) :]


def _print(message):
    _write(f"moe-tf-launch: {message}\n".encode())


def _signal_name(signum):
    try:
        return signal.Signals(signum).name
    except ValueError:  # Of the real-time signals only two have names.
        return f"signal {signum}"


class _Relay:
    """Prints the output that arrives through a pipe, after a prefix a line."""

    def __init__(self, pipe, prefix):
        os.set_blocking(pipe.fileno(), False)
        self.pipe = pipe
        self._prefix = prefix.encode()
        self._begun = b""  # A line that has not ended yet.

    def read(self):
        """Prints complete lines; returns the bytes read, None if none came."""
        try:
            chunk = os.read(self.pipe.fileno(), _LONGEST_LINE)
        except BlockingIOError:
            return None
        *lines, self._begun = (self._begun + chunk).split(b"\n")
        self._print(lines)
        if len(self._begun) >= _LONGEST_LINE:
            self._end_line()
        return chunk

    def close(self):
        """Prints the remaining output without waiting for more."""
        while self.read():
            pass
        self._end_line()
        self.pipe.close()

    def _end_line(self):
        if self._begun:
            self._print([self._begun])
            self._begun = b""

    def _print(self, lines):
        # Of a progress bar that overwrites itself, print the last state.
        shown = (line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines)
        _write(b"".join(self._prefix + line + b"\n" for line in shown))


class _Processes:
    """Processes that end together, watched by one thread.

    A program of several threads may not run Python code between fork and
    exec. So signals, SIGCHLD among them, arrive through a socket.
    """

    def __init__(self, grace_seconds):
        self._grace_seconds = grace_seconds
        self._started = []
        self._relays = {}  # by process
        self._exit_code = 0
        self._signaled_at = None  # Time of the first signal to end.
        self._killed = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._wakeup = socket.socketpair()

    def __enter__(self):
        self._listen()
        return self

    def __exit__(self, *_):
        self._send(signal.SIGKILL)
        for process in self._running():
            process.wait()
        # The exit code stands: Python, as it shuts down, would let one more
        # signal end the launcher.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)

    def start(self, command, environment):
        """Starts a process; raises `OSError` if the command cannot start."""
        first = not self._started
        launcher = os.getpid()

        def die_with_launcher():
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # The launcher has died already.
                os._exit(1)

        process = subprocess.Popen(
            command,
            env=environment,
            # The system stops a process that reads a terminal from another
            # process group.
            stdin=None if first and not os.isatty(0) else subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE,
            stderr=None if first else subprocess.STDOUT,
            # A group of its own: Ctrl-C comes from the launcher, once.
            process_group=0,
            preexec_fn=die_with_launcher if _LIBC else None,
        )
        if not first:
            relay = _Relay(process.stdout, f"[{len(self._started)}] ")
            self._relays[process] = relay
            self._selector.register(
                relay.pipe,
                selectors.EVENT_READ,
                functools.partial(self._pass_on_output, process),
            )
        self._started.append(process)

    def wait(self):
        """Waits until all processes have ended; returns the exit code."""
        while self._running():
            for key, _ in self._selector.select(self._seconds_left()):
                key.data()
            self._collect()
            if self._seconds_left() == 0:
                self._kill(f"{self._grace_seconds:g} s have passed")
        return self._exit_code

    def _listen(self):
        self._signals.setblocking(False)
        self._wakeup.setblocking(False)
        self._selector.register(
            self._signals, selectors.EVENT_READ, self._take_signals
        )
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _arrives_through_the_socket)
        for signum in _PASSED_ON:
            # Signals that `nohup` ignores stay ignored by all processes.
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, _arrives_through_the_socket)

    def _running(self):
        return [each for each in self._started if each.returncode is None]

    def _seconds_left(self):
        """Seconds until the processes are killed; None if they are not."""
        if self._signaled_at is None or self._killed:
            return None
        end = self._signaled_at + self._grace_seconds
        return max(0.0, end - time.monotonic())

    def _take_signals(self):
        for signum in self._signals.recv(4096):
            if signum == signal.SIGCHLD:
                continue
            if self._signaled_at is None:
                _print(
                    f"{_signal_name(signum)} is passed on; the next one kills"
                )
                self._signal_end(signum)
            elif self._killed:
                self._send(signal.SIGKILL)
            elif time.monotonic() - self._signaled_at >= _ONE_SIGNAL_SECONDS:
                self._kill(_signal_name(signum))

    def _pass_on_output(self, process):
        if self._relays[process].read() == b"":  # The process closed it.
            self._close(process)

    def _close(self, process):
        if relay := self._relays.pop(process, None):
            self._selector.unregister(relay.pipe)
            relay.close()

    def _collect(self):
        for index, process in enumerate(self._started):
            if process.returncode is not None or process.poll() is None:
                continue
            # The system reuses no process id while its group has members.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            self._close(process)
            if process.returncode:
                self._failed(index, process.returncode)

    def _failed(self, index, returncode):
        if returncode > 0:
            exit_code, how = returncode, f"ended with exit code {returncode}"
        else:
            exit_code = 128 - returncode
            how = f"was ended by {_signal_name(-returncode)}"
        self._exit_code = self._exit_code or exit_code
        if self._signaled_at is None:
            others = "; ending the others" if self._running() else ""
            _print(f"process {index} of {len(self._started)} {how}{others}")
            self._signal_end(signal.SIGTERM)

    def _signal_end(self, signum):
        self._signaled_at = time.monotonic()
        self._send(signum)

    def _kill(self, why):
        self._killed = True
        running = [
            str(index)
            for index, process in enumerate(self._started)
            if process.returncode is None
        ]
        if running:
            _print(f"{why}; killing process {', '.join(running)}")
            self._send(signal.SIGKILL)

    def _send(self, signum):
        for process in self._running():
            # A process keeps its id until it is waited for.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signum)


def _arrives_through_the_socket(signum, frame):
    """Empty handler; `set_wakeup_fd` works only for handled signals."""


def main(argv: list[str]) -> int:
    command = argv[1:]
    if not command:
        raise app.UsageError("No command. It follows the flags, after `--`.")
    if "TF_CONFIG" in os.environ:
        raise SystemExit(
            "TF_CONFIG is set, so this is a process of a cluster already. "
            "Start the command itself, or unset TF_CONFIG. "
            f"Received: TF_CONFIG={os.environ['TF_CONFIG']}"
        )
    try:
        own_environments = environments(
            free_ports(_NUM_PROCESSES.value, _PORT.value),
            _DEVICES_PER_PROCESS.value,
            os.environ,
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None
    with _Processes(_GRACE_SECONDS.value) as processes:
        try:
            for environment in own_environments:
                processes.start(command, environment)
        except OSError as error:  # The exit codes are those of shells.
            _print(f"cannot start {command[0]!r}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        return processes.wait()


def run() -> None:
    """Entry point of the console script `moe-tf-launch`."""
    flags.mark_flag_as_required("num_processes")
    flags.FLAGS.set_gnu_getopt(False)  # The command's flags are its own.
    app.run(main)


if __name__ == "__main__":
    run()
