"""Reader of TensorBoard's event files: records of a length, its checksum, an event and its checksum."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # type: ignore  # protobuf makes the class when it is imported


def scalars(directory: Path) -> dict[tuple[int, str], list[float]]:
    """Values in the event files of a directory, in the order of writing, by step and name."""
    found: dict[tuple[int, str], list[float]] = {}
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found.setdefault((event.step, value.tag), []).append(value.simple_value)
            at += 16 + length
    return found
