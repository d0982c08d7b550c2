"""The launcher as users run it, with small programs for its processes."""

import contextlib
import json
import os
import pathlib
import pty
import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from trainers import launch

REPOSITORY = pathlib.Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "trainers.launch")
PATIENCE = 60  # seconds until a test fails; none takes them
PROLOGUE = """
import json, os, signal, subprocess, sys, time
place = json.loads(os.environ["TF_CONFIG"])
index = place["task"]["index"]
if "FIFO" in os.environ:
    fifo = os.open(os.environ["FIFO"], os.O_WRONLY)
def ready():
    os.write(fifo, b"%d\\n" % index)
def wait():
    while True:
        time.sleep(0.01)  # signal.pause() misses one that comes just before
"""


def command(program, *flags):
    return [*LAUNCH, *flags, "--", sys.executable, "-c", PROLOGUE + program]


def run(program, *flags, **kwargs):
    return subprocess.run(
        command(program, *(flags or ["--num_processes=2"])),
        cwd=REPOSITORY,
        capture_output=True,
        timeout=PATIENCE,
        **kwargs,
    )


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
        deadline = time.monotonic() + PATIENCE
        while lines.count(b"\n") < number:
            assert time.monotonic() < deadline, lines
            select.select([self._end], [], [], 1)
            # Without data when some have ended, and others open it only now.
            with contextlib.suppress(BlockingIOError):
                lines += os.read(self._end, 4096)
            time.sleep(0.001)
        return lines

    def wait_until_closed(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            assert select.select([self._end], [], [], PATIENCE)[0]
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
            [*before, *command(program, "--num_processes=2", *flags)],
            cwd=REPOSITORY,
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


def test_tells_each_process_its_place_and_a_port_it_can_bind(tmp_path):
    program = """
import socket
server = socket.create_server(("", int(
    place["cluster"]["worker"][index].split(":")[1])))
open(os.path.join(sys.argv[1], str(index)), "w").write(json.dumps(place))
"""
    flags = ("--num_processes=3", "--", sys.executable, "-c")
    result = subprocess.run(
        [*LAUNCH, *flags, PROLOGUE + program, tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    places = [json.loads((tmp_path / name).read_text()) for name in "012"]
    for index, place in enumerate(places):
        assert place["task"] == {"type": "worker", "index": index}
        assert place["cluster"] == places[0]["cluster"]
    (addresses,) = places[0]["cluster"].values()
    assert len(set(addresses)) == 3
    assert {address.split(":")[0] for address in addresses} == {"localhost"}


@pytest.mark.parametrize(
    "ending,exit_code,how",
    [
        ("sys.exit(7)", 7, "ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was ended by SIGKILL"),
        ("os.kill(os.getpid(), 40)", 168, "was ended by signal 40"),
    ],
)
@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_fails_the_others_end(ending, exit_code, how, failing):
    # The exit code 5 of the other comes later, so it is not the launcher's.
    program = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
if index == {failing}:
    {ending}
wait()
"""
    result = run(program)
    assert result.returncode == exit_code
    assert result.stderr.decode() == (
        f"moe-tf-launch: process {failing} of 2 {how}; ending the others\n"
    )


def test_ends_with_0_when_all_do_and_waits_for_the_last_one(tmp_path):
    # While nobody waits for it, an ended process can still be signalled.
    program = f"""
path = {str(tmp_path / "number")!r}
if index == 1:
    open(path + "~", "w").write(str(os.getpid()))
    os.rename(path + "~", path)
    sys.exit()
deadline = time.monotonic() + {PATIENCE}
while time.monotonic() < deadline:
    time.sleep(0.01)
    if os.path.exists(path):
        try:
            os.kill(int(open(path).read()), 0)
        except ProcessLookupError:
            print("waited for")
            break
"""
    result = run(program)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"waited for\n"


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
    _, errors = launcher.communicate(b"go\n", timeout=PATIENCE)
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
    _, errors = launcher.communicate(timeout=PATIENCE)
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
    deadline = time.monotonic() + PATIENCE
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
    _, errors = launcher.communicate(timeout=PATIENCE)
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
    printed += launcher.communicate(timeout=PATIENCE)[1]
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
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == exit_code
    fifo.wait_until_closed()


def test_output_of_process_0_is_as_it_is_and_of_others_has_their_number():
    program = r"""
if index == 1:
    os.write(1, b"out\nb\xffr: 1/2\rb\xffr: 2/2\r\n\n" + 70_000 * b"x")
    os.close(1)
    os.write(2, b"y\nno end of line")
else:
    os.write(1, b"1/2\r2/2")
    os.write(2, b"\xff\r")
"""
    result = run(program)
    assert result.returncode == 0
    assert result.stdout == b"1/2\r2/2"
    printed = result.stderr.replace(b"\xff\r", b"", 1)
    first, second, third, *long, last = printed.splitlines(keepends=True)
    assert (first, second, third) == (
        b"[1] out\n",
        b"[1] b\xffr: 2/2\n",
        b"[1] \n",
    )
    # Lines that do not end are printed piece by piece.
    pieces = [line.removeprefix(b"[1] ")[:-1] for line in long]
    assert b"".join(pieces) == 70_000 * b"x" + b"y"
    assert last == b"[1] no end of line\n"


def test_process_0_alone_has_the_input():
    result = run("print(index, sys.stdin.read(), flush=True)", input=b"words")
    assert result.stdout == b"0 words\n"
    assert result.stderr == b"[1] 1 \n"


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
        os.chdir(REPOSITORY)
        os.environ["FIFO"] = str(fifo.path)
        os.execv(sys.executable, command(program, "--num_processes=2"))
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
    assert launcher.wait(timeout=PATIENCE) == 0


def launch_and_fail(*arguments, **environment):
    return subprocess.run(
        [*LAUNCH, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=PATIENCE,
        text=True,
    )


def test_wrong_commands(tmp_path):
    data = tmp_path / "data"
    data.touch()
    for arguments, exit_code, message in (
        (["--num_processes=2"], 1, "No command. It follows the flags"),
        (["--num_processes=2", "--"], 1, "No command. It follows the flags"),
        (["--", "true"], 1, "--num_processes must have a value"),
        (["--num_processes=0", "true"], 1, "0 is not a positive integer"),
        (["--num_processes=2", "no-such"], 127, "cannot start 'no-such': No "),
        (["--num_processes=2", data], 126, "Permission denied"),
        (["--num_processes=9", "--port=65530", "true"], 1, "no 9 ports up to"),
    ):
        result = launch_and_fail(*arguments)
        assert result.returncode == exit_code
        assert message in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_refuses_a_launch_inside_a_launch():
    result = launch_and_fail("--num_processes=2", "true", TF_CONFIG="{}")
    assert result.returncode == 1
    assert "a process of a cluster already" in result.stderr
    assert "TF_CONFIG={}" in result.stderr


def test_refuses_a_port_that_is_taken():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        flags = ("--num_processes=2", f"--port={port - 1}")
        result = launch_and_fail(*flags, "true")
    assert result.returncode == 1
    assert f"port {port} cannot be had: Address already in use" in result.stderr


def test_flags_after_the_command_are_its_own():
    for between in ([], ["--"]):
        result = launch_and_fail(
            "--num_processes=1", *between, "echo", "--port=x", "--", "--help"
        )
        assert result.stdout == "--port=x -- --help\n"


def test_each_process_gets_its_own_devices():
    program = """
print(*(os.environ.get(name) for name in
    ("MOE_TF_DEVICES_PER_PROCESS", "CUDA_VISIBLE_DEVICES")), flush=True)
"""
    flags = ("--num_processes=2", "--devices_per_process=2")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "3,0,1,2"}
    result = run(program, *flags, env=environment)
    assert (result.stdout, result.stderr) == (b"2 3,0\n", b"[1] 2 1,2\n")
    result = run(program, "--num_processes=2", env=environment)
    assert result.stdout == b"None 3,0,1,2\n"
    result = launch_and_fail(*flags, "true", CUDA_VISIBLE_DEVICES="0,1")
    assert result.returncode == 1
    assert "need 4 GPUs. Received: CUDA_VISIBLE_DEVICES=0,1" in result.stderr


@pytest.mark.parametrize(
    "visible,own",
    [
        (None, ["0,1", "2,3"]),
        ("-1", ["-1", "-1"]),
        ("", ["", ""]),
        ("GPU-a, GPU-b,GPU-c,GPU-d,GPU-e", ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
    ],
)
def test_own_gpus(visible, own):
    assert [launch.own_gpus(index, 2, 2, visible) for index in (0, 1)] == own
