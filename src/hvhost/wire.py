"""The one way to declare wire formats.

A message is a frozen dataclass deriving from :class:`Record`; each field's annotation carries its
:mod:`struct` code. Records are little-endian (:class:`BigEndianRecord`: the other way round) and
unpadded: padding is a field like any other, so that the declaration reads like the document it
comes from::

    @dataclass(frozen=True, slots=True)
    class ChannelMessageHeader(Record):  # linux/hyperv.h: struct vmbus_channel_message_header
        message_type: U32
        padding: U32 = 0

    header = ChannelMessageHeader.unpack(buffer)  # RemoteProtocolError if too short
    header.pack()

GUID fields are :class:`uuid.UUID` in the mixed-endian order of Microsoft's documents.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Self, get_args, get_type_hints

from hvhost.errors import RemoteProtocolError

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
I32 = Annotated[int, "i"]
I64 = Annotated[int, "q"]
Guid = Annotated[uuid.UUID, "16s"]
Bytes4 = Annotated[bytes, "4s"]
Bytes6 = Annotated[bytes, "6s"]
Bytes8 = Annotated[bytes, "8s"]
Bytes16 = Annotated[bytes, "16s"]
Bytes120 = Annotated[bytes, "120s"]
Buffer = bytes | bytearray | memoryview


class Record:
    """Base of every wire record: size, pack, unpack. Holds no state and no other behaviour."""

    __slots__ = ()
    _order: ClassVar[str] = "<"
    _struct: ClassVar[struct.Struct | None] = None
    _guids: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def _layout(cls) -> struct.Struct:
        layout = cls.__dict__.get("_struct")
        if layout is None:
            hints = get_type_hints(cls, include_extras=True)
            codes, guids = [], []
            for index, field in enumerate(fields(cls)):  # type: ignore[arg-type] # a dataclass
                kind, code = get_args(hints[field.name])[:2]
                if kind is uuid.UUID:
                    guids.append(index)
                codes.append(code)
            layout = struct.Struct(cls._order + "".join(codes))
            cls._struct, cls._guids = layout, tuple(guids)
        return layout

    @classmethod
    def wire_size(cls) -> int:
        """Size of the record in bytes."""
        return cls._layout().size

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> Self:
        """Read one record at *offset*; :class:`RemoteProtocolError` if the buffer is too short."""
        layout = cls._layout()
        if offset < 0 or len(buffer) - offset < layout.size:
            raise RemoteProtocolError(
                f"{cls.__name__} needs {layout.size} bytes at offset {offset}, "
                f"the message has {len(buffer)}; the sender cut it short."
            )
        values: list[Any] = list(layout.unpack_from(buffer, offset))
        for index in cls._guids:
            values[index] = uuid.UUID(bytes_le=values[index])
        return cls(*values)

    def pack(self) -> bytes:
        """The record's bytes; :class:`struct.error` if a value does not fit its field."""
        layout = self._layout()
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        for index in self._guids:
            values[index] = values[index].bytes_le
        return layout.pack(*values)


class BigEndianRecord(Record):
    """A record whose numbers have their most significant byte first, as in SCSI and VHD."""

    __slots__ = ()
    _order = ">"
