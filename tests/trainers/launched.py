"""`moe-tf-launch` with small programs for its processes."""

import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "moe_tf_trainers.launch")
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
