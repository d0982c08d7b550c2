"""Correctness, speed and cost of a mesh on all GPUs of a machine.

    python -m moe_tf.benchmarks.many_devices --out=runs/many_devices

Runs on meshes of 1, 2, 4, ... GPUs, or of virtual CPU devices on a machine
without GPUs. On CPUs all sizes are small, and times mean little. The parts:

- `equality`: the language model on real text, on a mesh against one device;
- `layer`: weak scaling of one `SparseMoE`, and its all-to-alls alone;
- `weak`: weak scaling of the language model, with constant numbers of words
  and experts for a device;
- `strong`: strong scaling of the language model MoE-256;
- `dense`: as `weak`, with a model without experts;
- `own_cost`: layer and model without a mesh, to compare with a mesh of one;
- `largest`: the largest number of parameters that one GPU trains.

Each measurement is a process of its own with a time limit, so that a failure
does not affect the others. Results are printed as they arrive. `--out` gets
`results.json`, `results.md` and a log of each measurement.

GPUs communicate through NCCL, or through the host with
`DTENSOR_GPU_USE_NCCL_COMMUNICATION=0` in the environment.
"""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterable
from collections.abc import Iterator

import tensorflow as tf
from absl import app
from absl import flags

from moe_tf.benchmarks import jobs

PARTS = (
    "equality",
    "layer",
    "own_cost",
    "weak",
    "strong",
    "dense",
    "largest",
)

_OUT = flags.DEFINE_string("out", "runs/many_devices", "Folder of results.")
_PARTS = flags.DEFINE_list("parts", list(PARTS), f"Of {', '.join(PARTS)}.")
_DEVICES = flags.DEFINE_list("devices", None, "Mesh sizes. Defaults to all.")
_DEVICE_TYPE = flags.DEFINE_enum(
    "device_type", None, ["CPU", "GPU"], "Defaults to GPUs if there are any."
)
_REFERENCE = flags.DEFINE_bool(
    "reference",
    True,
    "Whether `equality` trains on one device too, or reads that from `--out`.",
)
_WORDS = flags.DEFINE_integer(
    "words",
    None,
    "Words of a device in `weak`, `dense` and `own_cost`. Defaults to 32,768, "
    "on CPUs to 96.",
    1,
)
_SECONDS = flags.DEFINE_float(
    "seconds", 150, "Time limit of a measurement, in seconds.", 1
)
_TOTAL = flags.DEFINE_float("total", 480, "Time limit in all, in seconds.", 1)

_LAYER = {
    "GPU": {"tokens": 16_384, "experts": 8, "width": 1024, "hidden": 4096},
    "CPU": {
        **{"tokens": 64, "experts": 4, "width": 16, "hidden": 32},
        **{"repeats": 3, "calls": 1, "link_mib": 1},
    },
}
_MODEL = {
    "GPU": {},
    "CPU": {
        **{"length": 6, "width": 16, "vocabulary": 500, "sampled": 32},
        "steps": 3,
    },
}
# Words and experts: for each device, and in all.
_WEAK = {"GPU": (32_768, 128), "CPU": (96, 4)}
_STRONG = {"GPU": (32_768, 256), "CPU": (384, 8)}
_NUM_GROUPS = 8  # Token groups in `strong`, on any mesh.
# Fractions of TensorFlow's GPU memory, of which the first that trains counts.
_MEMORY_FRACTIONS = (0.84, 0.8, 0.74, 0.66, 0.5)


class Benchmark:
    """Jobs of each part, for meshes of the given sizes.

    Args:
        sizes: list of ints, numbers of devices.
        device_type: `"CPU"` or `"GPU"`
        folder: path of the results.
    """

    def __init__(
        self, sizes: list[int], device_type: str, folder: pathlib.Path
    ):
        self._sizes = sizes
        self._type = device_type
        self._folder = folder

    def equality(self) -> Iterator[jobs.Job]:
        steps = 20 if self._type == "GPU" else 3
        reference = [None] if _REFERENCE.value else []
        for axes in [*reference, *self._square_meshes()]:
            yield self._job(
                "mesh_text:compare_with_one_device",
                axes,
                folder=str(pathlib.Path(self._folder).absolute()),
                kinds=[("float32", "adam"), ("mixed_bfloat16", "sgd")],
                steps=steps,
            )

    def _square_meshes(self):
        for size in self._sizes:
            yield {"batch": size}
            if size > 1:
                yield {"batch": size // 2, "expert": 2}

    def layer(self) -> Iterator[jobs.Job]:
        for size in self._sizes:
            yield self._layer({"batch": size})

    def own_cost(self) -> Iterator[jobs.Job]:
        for jit_compile in (False, "auto"):
            yield self._layer(None, jit_compile=jit_compile)
            yield self._weak(None, jit_compile=jit_compile)

    def weak(self) -> Iterator[jobs.Job]:
        for size in self._sizes:
            yield self._weak({"batch": size})

    def dense(self) -> Iterator[jobs.Job]:
        for size in self._sizes:
            yield self._weak({"batch": size}, scaling="dense", experts=0)

    def strong(self) -> Iterator[jobs.Job]:
        words, experts = _STRONG[self._type]
        for size in self._sizes:
            sizes = {"words": words, "experts": experts, "groups": _NUM_GROUPS}
            yield self._model({"batch": size}, scaling="strong", **sizes)

    def largest(self) -> Iterator[jobs.Job]:
        if self._type != "GPU":
            return
        for fraction in _MEMORY_FRACTIONS:
            yield self._job("largest:train_on_gpu", None, fraction=fraction)

    def _layer(self, axes, **settings):
        settings = {**_LAYER[self._type], **settings}
        return self._job("mesh_layer:measure_layer", axes, **settings)

    def _weak(self, axes, **settings):
        words, experts = _WEAK[self._type]
        words = _WORDS.value or words
        size = axes["batch"] if axes else 1
        sizes = {"words": size * words, "experts": size * experts}
        settings = {"scaling": "weak", "groups": size, **sizes, **settings}
        return self._model(axes, **settings)

    def _model(self, axes, **settings):
        settings = {**_MODEL[self._type], **settings}
        return self._job("mesh_model:measure_model", axes, **settings)

    def _job(self, function, axes, **settings):
        size = 1
        for length in (axes or {}).values():
            size *= length
        arguments = dict(settings)
        if function != "largest:train_on_gpu":
            arguments |= {"axes": axes, "device_type": self._type}
        words = [function.replace(":", "_"), *map(str, _flat(axes, settings))]
        return jobs.Job(
            "_".join(words),
            f"moe_tf.benchmarks.{function}",
            arguments,
            _visible(size) if self._type == "GPU" else {},
        )


def _flat(axes, settings):
    """Yields the settings that distinguish jobs of one function."""
    yield from (f"{name}{size}" for name, size in (axes or {"none": 1}).items())
    names = ("scaling", "words", "jit_compile", "fraction")
    yield from (settings[name] for name in names if name in settings)


def _visible(size):
    """Environment of a process that may use so many GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, itertools.count())
    return {"CUDA_VISIBLE_DEVICES": ",".join(itertools.islice(names, size))}


def run_part(
    part: str, part_jobs: Iterable[jobs.Job], folder: pathlib.Path, end: float
) -> list[dict]:
    """Runs the jobs of a part until the time `end`; returns their records."""
    all_records = []
    for job in part_jobs:
        left = min(_SECONDS.value, end - time.monotonic())
        if left < 5:
            print(f"{job.name} was left out: no time left", flush=True)
            all_records.append({"failed": job.name, "why": "no time left"})
            continue
        start = time.monotonic()
        records, error = jobs.run_job(job, folder, left, _print)
        took = time.monotonic() - start
        print(f"[{part}: {job.name} took {took:.0f} s]", flush=True)
        all_records += records
        if error:
            all_records.append({"failed": job.name, "why": error})
        elif part == "largest":
            break
    return all_records


def _print(text):
    print(text, flush=True)


def markdown(results: dict[str, list[dict]]) -> str:
    """Formats the records of each part as a Markdown table."""
    lines = []
    for part, records in results.items():
        columns = list(dict.fromkeys(name for r in records for name in r))
        lines += [f"## {part}", "", _row(columns), _row(["---"] * len(columns))]
        lines += [
            _row([jobs.format_value(record.get(name, "")) for name in columns])
            for record in records
        ]
        lines.append("")
    return "\n".join(lines)


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    unknown = [part for part in _PARTS.value if part not in PARTS]
    if unknown:
        raise app.UsageError(f"`parts` are {PARTS}. Received: {unknown}")
    end = time.monotonic() + _TOTAL.value
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    device_type = _DEVICE_TYPE.value or ("GPU" if num_gpus else "CPU")
    largest = num_gpus if device_type == "GPU" else 2
    sizes = [2**power for power in range(4) if 2**power <= largest]
    if _DEVICES.value is not None:
        sizes = [int(size) for size in _DEVICES.value]
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{device_type}, meshes of {sizes} devices", flush=True)
    benchmark, results = Benchmark(sizes, device_type, folder), {}
    for part in _PARTS.value:
        part_jobs = getattr(benchmark, part)()
        results[part] = run_part(part, part_jobs, folder, end)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        (folder / "results.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    app.run(main)
