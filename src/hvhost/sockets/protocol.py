"""Hyper-V sockets on the wire; no I/O.

Sources: ``net/vmw_vsock/hyperv_transport.c`` of Linux 6.1 and ``linux/hyperv.h``, names as there.

A connection is one channel, offered when one side wants to connect and rescinded when it is over:

* The guest connects with TL_CONNECT_REQUEST; the host, if somebody listens, offers a channel whose
  interface type is the service asked for and whose instance is the guest's endpoint.
* The host connects by offering a channel whose interface type is the service in the guest and
  whose instance is an endpoint of the host's making, with the first user-defined byte of the pipe
  set. A guest in which nobody listens says nothing.

Opening the channel is accepting. Data are in-band packets, each with a header of its own; one
without data ends its direction. Who wants no more closes; only the host can end a connection.

On the host, a program listens on a Unix socket named after the service, and connects through
one that every machine has by writing :func:`connect_line`, which is answered in one line: ``OK``
and a number, or ``REFUSED`` and a reason.
"""

from __future__ import annotations

import struct
import uuid
from typing import Final

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.vmbus.channel import Offer
from hvhost.vmbus.protocol import MAX_USER_DEFINED_BYTES, VMBUS_PIPE_TYPE_BYTE, OfferFlags

#: Services that are ports: the port in place of the zero. Linux knows no others.
SRV_ID_TEMPLATE: Final = uuid.UUID("00000000-facb-11e6-bd58-64006a7986d3")
#: Most bytes of data in one packet.
HVS_MTU_SIZE: Final = 16 << 10
#: What a packet needs in the ring beside its data: descriptor, header, trailer.
HVS_PACKET_OVERHEAD: Final = 16 + 8 + 8
#: Bytes of the longest line :func:`parse_connect_line` takes, its end included.
CONNECT_LINE_LIMIT: Final = 64
#: The socket through which programs on the host connect to the guest.
CONNECT_SOCKET: Final = "vsock.sock"

_PORT_LIMIT: Final = 1 << 32
_TEMPLATE_TAIL: Final = SRV_ID_TEMPLATE.bytes_le[4:]
_PIPE_DATA: Final = 1  # vmpipe_proto_header.pkt_type
_HEADER = struct.Struct("<II")  # struct vmpipe_proto_header: pkt_type, data_size
_FROM_HOST: Final = 4  # user_def[0] of a pipe offer stands behind its pipe_mode

#: A zero-length packet: nothing more comes from this side.
FIN: Final = _HEADER.pack(_PIPE_DATA, 0)

Service = int | uuid.UUID


def service_id(service: Service) -> uuid.UUID:
    """The GUID of a service given as port or as GUID; :class:`HvHostError` if it is no port."""
    if isinstance(service, uuid.UUID):
        return service
    if not 0 <= service < _PORT_LIMIT:
        raise HvHostError(f"{service} is no socket port; ports are 0 to {_PORT_LIMIT - 1}.")
    return uuid.UUID(bytes_le=service.to_bytes(4, "little") + _TEMPLATE_TAIL)


def port_of(service: uuid.UUID) -> int | None:
    """The port a service GUID stands for, ``None`` for one of somebody's own."""
    encoded = service.bytes_le
    return int.from_bytes(encoded[:4], "little") if encoded[4:] == _TEMPLATE_TAIL else None


def parse_service(text: str) -> uuid.UUID:
    """A service as people write it: a port number or a GUID; :class:`HvHostError` otherwise."""
    if text.isascii() and text.isdecimal() and len(text) <= len(str(_PORT_LIMIT)):
        return service_id(int(text))
    try:
        if len(text) == 36:  # no braces, prefixes or missing dashes
            return uuid.UUID(text)
    except ValueError:
        pass
    raise HvHostError(f"{text!r} is no socket service; give a port number or a GUID.")


def listen_name(service: uuid.UUID) -> str:
    """Name of the Unix socket on which a program of the host listens for *service*."""
    port = port_of(service)
    return f"hvsock_{service}.sock" if port is None else f"vsock_{port}.sock"


def describe(service: uuid.UUID) -> str:
    """A service for people: ``port 5000``, or its GUID."""
    port = port_of(service)
    return f"service {service}" if port is None else f"port {port}"


def connect_line(service: uuid.UUID) -> bytes:
    """What a program writes into :data:`CONNECT_SOCKET` to reach *service* in the guest."""
    port = port_of(service)
    return f"CONNECT {service if port is None else port}\n".encode()


def parse_answer(line: bytes) -> None:
    """:class:`HvHostError` with the reason unless *line* answers a connect line with ``OK``."""
    if not line.startswith(b"OK "):
        word, _, reason = line.decode("utf-8", "replace").strip().partition(" ")
        if word != "REFUSED":
            reason = "the machine went away."
        raise HvHostError(f"The connection to the guest was refused: {reason}")


def parse_connect_line(line: bytes) -> uuid.UUID:
    """The service a connect line (without its end) asks for; :class:`HvHostError` for others."""
    word, _, rest = line.partition(b" ")
    if word != b"CONNECT":
        raise HvHostError("the first line must be CONNECT and a port number or a GUID.")
    return parse_service(rest.rstrip(b"\r").decode("ascii", "replace"))


def offer_to_guest(service: uuid.UUID, endpoint: uuid.UUID) -> Offer:
    """The offer with which the host connects to *service* of the guest."""
    return _offer(service, endpoint, f"socket to guest {describe(service)}", from_host=True)


def answer_to_guest(service: uuid.UUID, endpoint: uuid.UUID) -> Offer:
    """The offer that answers a guest whose *endpoint* connects to *service* of the host."""
    return _offer(service, endpoint, f"socket to host {describe(service)}", from_host=False)


def _offer(service: uuid.UUID, endpoint: uuid.UUID, name: str, *, from_host: bool) -> Offer:
    user_defined = VMBUS_PIPE_TYPE_BYTE.to_bytes(_FROM_HOST, "little") + bytes([from_host])
    return Offer(
        interface_type=service,
        interface_instance=endpoint,
        name=name,
        flags=OfferFlags.NAMED_PIPE_MODE | OfferFlags.TLNPI_PROVIDER_OFFER,
        user_defined=user_defined.ljust(MAX_USER_DEFINED_BYTES, b"\0"),
    )


def encode_data(data: bytes) -> bytes:
    """The payload of a packet with *data*: at least one byte, at most :data:`HVS_MTU_SIZE`."""
    return _HEADER.pack(_PIPE_DATA, len(data)) + data


def decode_data(payload: bytes) -> bytes:
    """The data in a packet's payload, empty if the guest sends no more.

    :class:`RemoteProtocolError` if the packet is cut short, too long or of another kind.
    """
    if len(payload) < _HEADER.size:
        raise RemoteProtocolError(f"a socket packet has {len(payload)} bytes, not even a header.")
    kind, size = _HEADER.unpack_from(payload)
    if kind != _PIPE_DATA:
        raise RemoteProtocolError(f"a socket packet is of type {kind}; only data (1) is known.")
    if size > HVS_MTU_SIZE or size > len(payload) - _HEADER.size:
        raise RemoteProtocolError(
            f"a socket packet announces {size} bytes and has {len(payload) - _HEADER.size}; at "
            f"most {HVS_MTU_SIZE} are allowed."
        )
    return payload[_HEADER.size : _HEADER.size + size]


def data_size(ring_size: int) -> int:
    """Bytes of data to put into one packet for a ring of *ring_size* bytes, a page at least.

    A quarter of the ring, so that the guest reads one while the next ones are written.
    """
    return min(HVS_MTU_SIZE, ring_size // 4 - HVS_PACKET_OVERHEAD)
