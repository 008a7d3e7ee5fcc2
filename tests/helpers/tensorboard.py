"""Reads TensorBoard's event files, which need no TensorFlow: TFRecords of one protocol buffer each."""

from pathlib import Path

from tensorboardX.proto import event_pb2


def events(folder: Path) -> list[event_pb2.Event]:  # pyright: ignore[reportAttributeAccessIssue]
    """All events in a folder's event files, in order of the files' names."""
    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:  # TFRecord: length u64, crc u32, payload, crc u32
            size = int.from_bytes(data[:8], "little")
            payload = data[12 : 12 + size]
            found.append(event_pb2.Event.FromString(payload))  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + size :]
    return found
