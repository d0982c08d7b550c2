"""How processes of the launcher end: told, killed, left behind."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.trainers import launched


class Fifo:
    """Held open by processes: tells when they are ready, and when all ended.

    The kernel closes it for a process however that ends, so nothing here
    depends on time.
    """

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path
        self._end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def wait_until_ready(self, number):
        lines = b""
        deadline = time.monotonic() + launched.PATIENCE
        while lines.count(b"\n") < number:
            assert time.monotonic() < deadline, lines
            select.select([self._end], [], [], 1)
            # Without data when some have ended, and others open it only now.
            with contextlib.suppress(BlockingIOError):
                lines += os.read(self._end, 4096)
            time.sleep(0.001)
        return lines

    def wait_until_closed(self):
        deadline = time.monotonic() + launched.PATIENCE
        while True:
            assert select.select([self._end], [], [], launched.PATIENCE)[0]
            assert time.monotonic() < deadline
            if not os.read(self._end, 4096):
                return


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """A script's background jobs ignore SIGINT, and so would the launcher."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {each: signal.signal(each, handlers[each]) for each in handlers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fifo(tmp_path):
    return Fifo(tmp_path / "fifo")


@pytest.fixture
def start(fifo):
    """Starts a launcher, and ends it whatever the test does."""
    started = []

    def start(program, *flags, before=(), **kwargs):
        process = subprocess.Popen(
            [*before, *launched.command(program, "--num_processes=2", *flags)],
            cwd=launched.REPOSITORY,
            env={**os.environ, "FIFO": str(fifo.path)},
            stderr=subprocess.PIPE,
            start_new_session=True,
            **kwargs,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def test_who_does_not_end_when_told_is_killed(fifo, start):
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
if index == 1:
    wait()
sys.stdin.readline()
sys.exit(3)
"""
    launcher = start(program, "--grace_seconds=0.5", stdin=subprocess.PIPE)
    fifo.wait_until_ready(2)
    _, errors = launcher.communicate(b"go\n", timeout=launched.PATIENCE)
    assert launcher.returncode == 3
    assert errors.decode().splitlines() == [
        "moe-tf-launch: process 0 of 2 ended with exit code 3; "
        "ending the others",
        "moe-tf-launch: 0.5 s have passed; killing process 1",
    ]
    fifo.wait_until_closed()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_are_passed_on_to_all(name, fifo, start):
    program = """
def end(number, frame):
    os.write(2, f"{signal.Signals(number).name}\\n".encode())
    sys.exit(20 + index)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
ready()
wait()
"""
    launcher = start(program)
    fifo.wait_until_ready(2)
    launcher.send_signal(signal.Signals[name])
    _, errors = launcher.communicate(timeout=launched.PATIENCE)
    assert launcher.returncode in (20, 21)
    assert sorted(errors.decode().splitlines()) == [
        name,
        f"[1] {name}",
        f"moe-tf-launch: {name} is passed on; the next one kills",
    ]


DEAF = """
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
ready()
wait()
"""


def test_the_second_signal_kills(fifo, start):
    launcher = start(DEAF)
    fifo.wait_until_ready(2)
    launcher.send_signal(signal.SIGINT)
    assert b"SIGINT is passed on" in launcher.stderr.readline()
    # For a second it may be the same one again.
    deadline = time.monotonic() + launched.PATIENCE
    while launcher.poll() is None:
        assert time.monotonic() < deadline
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.001)  # Some arrive while Python shuts down.
    assert launcher.returncode == 137
    assert launcher.stderr.read().decode() == (
        "moe-tf-launch: SIGINT; killing process 0, 1\n"
    )
    fifo.wait_until_closed()


def test_a_signal_sent_twice_at_once_is_one(fifo, start):
    """`timeout` does: to the process, then to its group."""
    program = """
def end(number, frame):
    ready()
    time.sleep(0.3)  # a checkpoint, say
    sys.exit(9)
signal.signal(signal.SIGTERM, end)
ready()
wait()
"""
    launcher = start(program)
    fifo.wait_until_ready(2)
    launcher.send_signal(signal.SIGTERM)
    fifo.wait_until_ready(2)  # The first was passed on.
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=launched.PATIENCE)
    assert launcher.returncode == 9
    assert b"killing" not in errors


def test_what_nohup_ignores_stays_ignored(fifo, start):
    program = """
ready()
while index == 1 and not os.path.exists(os.environ["FIFO"] + ".go"):
    time.sleep(0.01)
os.write(2, b"goes on\\n")
wait()
"""
    launcher = start(program, before=["nohup"], stdout=subprocess.DEVNULL)
    fifo.wait_until_ready(2)
    os.killpg(launcher.pid, signal.SIGHUP)
    fifo.path.with_suffix(".go").touch()
    printed = b""
    while b"[1] goes on" not in printed:
        line = launcher.stderr.readline()
        assert line, printed
        printed += line
    launcher.terminate()
    printed += launcher.communicate(timeout=launched.PATIENCE)[1]
    assert launcher.returncode == 128 + signal.SIGTERM
    assert b"SIGTERM is passed on" in printed
    assert b"SIGHUP" not in printed


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_processes_die_with_a_killed_launcher(fifo, start):
    launcher = start(DEAF)
    fifo.wait_until_ready(2)
    launcher.kill()
    fifo.wait_until_closed()


@pytest.mark.parametrize("exit_code", [0, 4])
def test_what_an_ended_process_leaves_running_is_killed(exit_code, fifo, start):
    program = f"""
subprocess.Popen(
    [sys.executable, "-c", "import signal; signal.pause()"],
    pass_fds=[fifo],
)
sys.exit({exit_code})
"""
    launcher = start(program)
    launcher.communicate(timeout=launched.PATIENCE)
    assert launcher.returncode == exit_code
    fifo.wait_until_closed()


def test_ctrl_c_in_a_terminal_comes_once(fifo):
    program = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
ready()
came = [signal.sigtimedwait([signal.SIGINT], 60)]
came.append(signal.sigtimedwait([signal.SIGINT], 0.5))
came = [each and each.si_signo for each in came]
line = f"{index}: {came}, terminals: {os.isatty(0)}, {os.isatty(1)}\\n"
os.write(1, line.encode())  # in one piece, which print does not promise
"""
    launcher, terminal = pty.fork()
    if not launcher:
        os.chdir(launched.REPOSITORY)
        os.environ["FIFO"] = str(fifo.path)
        os.execv(sys.executable, launched.command(program, "--num_processes=2"))
    try:
        fifo.wait_until_ready(2)
        os.write(terminal, b"\x03")
        fifo.wait_until_closed()
        _, status = os.waitpid(launcher, 0)
        printed = os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "\n0: [2, None], terminals: False, True\r\n" in printed
    assert "\n[1] 1: [2, None], terminals: False, False\r\n" in printed


def test_runs_on_when_nobody_reads_its_messages(fifo, start):
    program = """
if index == 1:
    ready()
    while not os.path.exists(os.environ["FIFO"] + ".go"):
        time.sleep(0.01)
    print("unheard" * 100_000, flush=True)
"""
    launcher = start(program)
    fifo.wait_until_ready(1)
    launcher.stderr.close()
    fifo.path.with_suffix(".go").touch()
    assert launcher.wait(timeout=launched.PATIENCE) == 0
