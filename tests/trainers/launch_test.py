"""The launcher as users run it: places, output, exit codes, refusals."""

import json
import os
import socket
import subprocess
import sys

import pytest

from moe_tf_trainers import launch
from tests.trainers import launched


def test_tells_each_process_its_place_and_a_port_it_can_bind(tmp_path):
    program = """
import socket
server = socket.create_server(("", int(
    place["cluster"]["worker"][index].split(":")[1])))
open(os.path.join(sys.argv[1], str(index)), "w").write(json.dumps(place))
"""
    flags = ("--num_processes=3", "--", sys.executable, "-c")
    result = subprocess.run(
        [*launched.LAUNCH, *flags, launched.PROLOGUE + program, tmp_path],
        cwd=launched.REPOSITORY,
        capture_output=True,
        timeout=launched.PATIENCE,
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
    result = launched.run(program)
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
deadline = time.monotonic() + {launched.PATIENCE}
while time.monotonic() < deadline:
    time.sleep(0.01)
    if os.path.exists(path):
        try:
            os.kill(int(open(path).read()), 0)
        except ProcessLookupError:
            print("waited for")
            break
"""
    result = launched.run(program)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"waited for\n"


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
    result = launched.run(program)
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
    result = launched.run(
        "print(index, sys.stdin.read(), flush=True)", input=b"words"
    )
    assert result.stdout == b"0 words\n"
    assert result.stderr == b"[1] 1 \n"


def launch_and_fail(*arguments, **environment):
    return subprocess.run(
        [*launched.LAUNCH, *arguments],
        cwd=launched.REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=launched.PATIENCE,
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
    result = launched.run(program, *flags, env=environment)
    assert (result.stdout, result.stderr) == (b"2 3,0\n", b"[1] 2 1,2\n")
    result = launched.run(program, "--num_processes=2", env=environment)
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
