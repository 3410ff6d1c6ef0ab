"""Records a process's requests to TensorFlow's allocator, with TensorFlow's own profiler.

It reads the profiler's events MemoryAllocation and MemoryDeallocation, and the marks of `TraceRecorder.phase`.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError

from accumtune.memory.cpu_simulation.allocation_trace import Trace

_PHASE = "accumtune phase "
_ALLOCATION, _RETURN = "MemoryAllocation", "MemoryDeallocation"
_READ = ("requested_bytes", "addr", "tf_op", "region_type", "data_type")


class TraceRecorder:
    """Records from its construction on. Construct it when the device was just opened and nothing else has run."""

    def __init__(self) -> None:
        # The folder is created when the recording ends, so a process that runs out of memory leaves none.
        self._folder = Path(tempfile.gettempdir()) / f"accumtune_trace_{uuid.uuid4().hex}"
        options = tf.profiler.experimental.ProfilerOptions(
            host_tracer_level=_level(), python_tracer_level=0, device_tracer_level=0
        )
        tf.profiler.experimental.start(str(self._folder), options=options)

    def phase(self, accumulation_steps: int) -> None:
        """Marks that the following requests belong to updates of so many micro-steps; 0: to no update."""
        with tf.profiler.experimental.Trace(f"{_PHASE}{accumulation_steps}"):
            pass

    def finished(self, micro_batch_size: int) -> Trace | None:
        """Ends the recording and returns it; None if TensorFlow could not write it, for example to a full disk.

        Only one recording per process is complete: a second one would miss what is held already.
        """
        try:
            tf.profiler.experimental.stop()
            content = next(self._folder.rglob("*.xplane.pb")).read_bytes()
            return _trace(micro_batch_size, _events(content))
        except (OSError, StopIteration, DecodeError, tf.errors.OpError):
            return None
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _level() -> int:
    """Returns the profiler's level whose events include allocations: 1 since TensorFlow 2.21, before that 2."""
    major, minor = (int(number) for number in tf.__version__.split(".")[:2])
    return 1 if (major, minor) >= (2, 21) else 2


def _events(content: bytes) -> list[tuple[int, str, dict[str, Any]]]:
    """Returns time, kind and properties of each event, in order of time."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    events = []
    for plane in xplane_pb2.XSpace.FromString(content).planes:
        kinds = {number: entry.name for number, entry in plane.event_metadata.items()}
        texts = {number: entry.name for number, entry in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                kind = kinds[event.metadata_id]
                if kind in (_ALLOCATION, _RETURN) or kind.startswith(_PHASE):
                    time = line.timestamp_ns * 1000 + event.offset_ps
                    events.append((time, kind, dict(_stats(event, texts))))
    return sorted(events, key=lambda event: event[0])


def _stats(event: Any, texts: dict[int, str]) -> Iterator[tuple[str, Any]]:
    for stat in event.stats:
        name = texts[stat.metadata_id]
        if name in _READ:
            kind = stat.WhichOneof("value")
            value = getattr(stat, kind)
            yield name, texts.get(value, "") if kind == "ref_value" else value


def _trace(micro_batch_size: int, found: list[tuple[int, str, dict[str, Any]]]) -> Trace:
    events: list[int] = []
    names: list[str] = []
    phases: list[tuple[int, int]] = []
    held: dict[int, int] = {}
    for _, kind, stats in found:
        if kind == _ALLOCATION:
            held[stats["addr"]] = len(names)
            events.append(stats["requested_bytes"])
            maker = stats.get("tf_op", "")
            names.append(f"{maker} {stats.get('region_type', '')} {stats.get('data_type', '')}" if maker else "")
        elif kind == _RETURN:
            request = held.pop(stats["addr"], None)
            if request is not None:  # None: allocated before the recording
                events.append(-1 - request)
        else:
            phases.append((int(kind.removeprefix(_PHASE)), len(events)))
    return Trace(micro_batch_size, tuple(events), tuple(names), tuple(phases))
