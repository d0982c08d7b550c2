"""Runs a command as several processes of one machine that end together.

    moe-tf-launch --num_processes=2 -- moe-tf-lm --config=... --workdir=...

Each process learns its place from `TF_CONFIG`, as a cluster of machines tells
it: the addresses of all, and its own number. Of process 0, output is passed
through as it is, and input too unless that is a terminal. What the others
print, to stdout or stderr, goes to stderr with `[1] ` before each line.

When a process fails, the others are told to end (SIGTERM), and `moe-tf-launch`
ends with the exit code of the first that failed: 128 + n for signal n. One
that ends with 0 leaves the others running. SIGINT (Ctrl-C), SIGTERM and SIGHUP
are passed on to all. Whoever still runs `--grace_seconds` after being told to
end, or at the next signal, is killed (SIGKILL), and so is whatever a process
that ended has left running in its process group. On Linux the processes die
with the launcher even if it is killed; what they started themselves may not.

Ports are found by trying. Should another program take one before the process
does, that process fails to start its server and all end: run it again, or
choose the ports with `--port`.
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

from absl import app
from absl import flags

_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes to start.", 1
)
_DEVICES_PER_PROCESS = flags.DEFINE_integer(
    "devices_per_process",
    None,
    "Devices of a process, told in MOE_TF_DEVICES_PER_PROCESS. Each gets as "
    "many GPUs of its own, by CUDA_VISIBLE_DEVICES unless that names none; "
    "without GPUs the devices are virtual CPUs.",
    1,
)
_PORT = flags.DEFINE_integer(
    "port", 0, "Port of process 0, others follow; 0: any free ones.", 0
)
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds", 30.0, "From being told to end until being killed.", 0
)

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Some, as `timeout`, signal a process and then its group: that is one signal.
_ONE_SIGNAL_SECONDS = 1.0
# Below the range from which systems take ports for outgoing connections. A
# client of a port inside it may be given that very port, and block the server.
_ANY_PORT = range(10_000, 32_768)
_LONGEST_LINE = 2**16
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_ports(number, first=0):
    """`number` ports that nobody listens on: `first` and those after it.

    With `first=0` any. Raises `ValueError` when a given one is in use.
    """
    if first + number - 1 > 65_535:
        raise ValueError(
            f"--port={first} leaves no {number} ports up to 65535."
        )
    candidates = range(first, first + number)
    if not first:
        candidates = random.sample(_ANY_PORT, len(_ANY_PORT))
    ports = []
    for port in candidates:
        if len(ports) == number:
            break
        # As a server binds it: on all interfaces, whatever old connections.
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
    if len(ports) < number:
        raise ValueError(f"Fewer than {number} ports are free.")
    return ports


def own_gpus(index, num_processes, number, visible):
    """`CUDA_VISIBLE_DEVICES` of process `index`, `number` for each.

    Args:
        visible: the variable's value, `None` where it is not set.
    """
    if visible is None:  # All GPUs; harmless where there are none.
        return ",".join(map(str, range(index * number, (index + 1) * number)))
    names = [name.strip() for name in visible.split(",")]
    if names[0] in ("", "-1"):  # None, by choice.
        return visible
    if len(names) < num_processes * number:
        raise ValueError(
            f"{num_processes} processes with --devices_per_process={number} "
            f"need {num_processes * number} GPUs. "
            f"Received: CUDA_VISIBLE_DEVICES={visible}"
        )
    return ",".join(names[index * number : (index + 1) * number])


def environments(ports, devices_per_process, environment):
    """`environment` with the place in the cluster, for each process."""
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


def _say(message):
    _write(f"moe-tf-launch: {message}\n".encode())


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:  # Of the real-time signals only two have names.
        return f"signal {number}"


class _Relay:
    """Prints what comes through `pipe`, each line after `prefix`."""

    def __init__(self, pipe, prefix):
        os.set_blocking(pipe.fileno(), False)
        self.pipe = pipe
        self._prefix = prefix.encode()
        self._begun = b""  # a line whose end has not come yet

    def read(self):
        """Prints the lines that are there; what came, `None` if nothing."""
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
        """Prints what is left, without waiting for more."""
        while self.read():
            pass
        self._end_line()
        self.pipe.close()

    def _end_line(self):
        if self._begun:
            self._print([self._begun])
            self._begun = b""

    def _print(self, lines):
        # A progress bar that writes over itself is shown as it ended.
        shown = (line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines)
        _write(b"".join(self._prefix + line + b"\n" for line in shown))


class _Processes:
    """Processes that end together, watched by one thread.

    One, since a program with more may not run Python code between fork and
    exec: signals, and the news that a process ended, come through a socket.
    """

    def __init__(self, grace_seconds):
        self._grace_seconds = grace_seconds
        self._started = []
        self._relays = {}  # by process
        self._exit_code = 0
        self._told_at = None  # when they were told to end
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
        """Starts one more; `OSError` if the command cannot be started."""
        first = not self._started
        launcher = os.getpid()

        def die_with_launcher():
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher:  # It was faster.
                os._exit(1)

        process = subprocess.Popen(
            command,
            env=environment,
            # Outside the terminal's group a process that reads is stopped.
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
        """Returns the exit code when all have ended."""
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
        for number in _PASSED_ON:
            # What `nohup` told to ignore stays ignored, by all processes.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _arrives_through_the_socket)

    def _running(self):
        return [each for each in self._started if each.returncode is None]

    def _seconds_left(self):
        """Until the processes are killed; `None` if they are not to be."""
        if self._told_at is None or self._killed:
            return None
        end = self._told_at + self._grace_seconds
        return max(0.0, end - time.monotonic())

    def _take_signals(self):
        for number in self._signals.recv(4096):
            if number == signal.SIGCHLD:
                continue
            if self._told_at is None:
                _say(f"{_signal_name(number)} is passed on; the next one kills")
                self._tell(number)
            elif self._killed:
                self._send(signal.SIGKILL)
            elif time.monotonic() - self._told_at >= _ONE_SIGNAL_SECONDS:
                self._kill(_signal_name(number))

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
            # The number is not given away while its group has members.
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
        if self._told_at is None:
            others = "; ending the others" if self._running() else ""
            _say(f"process {index} of {len(self._started)} {how}{others}")
            self._tell(signal.SIGTERM)

    def _tell(self, number):
        self._told_at = time.monotonic()
        self._send(number)

    def _kill(self, why):
        self._killed = True
        running = [
            str(index)
            for index, process in enumerate(self._started)
            if process.returncode is None
        ]
        if running:
            _say(f"{why}; killing process {', '.join(running)}")
            self._send(signal.SIGKILL)

    def _send(self, number):
        for process in self._running():
            # Until it is waited for, its number belongs to it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)


def _arrives_through_the_socket(number, frame):
    """Without a handler in Python, `set_wakeup_fd` does not tell."""


def main(argv):
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
            _say(f"cannot start {command[0]!r}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        return processes.wait()


def run():
    """Entry point of the console script `moe-tf-launch`."""
    flags.mark_flag_as_required("num_processes")
    flags.FLAGS.set_gnu_getopt(False)  # The command's flags are its own.
    app.run(main)


if __name__ == "__main__":
    run()
