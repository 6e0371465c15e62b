"""gRPC as far as the benchmarks need it: unary calls, and streams of answers, one at a time, over HTTP/2 on a unix socket.

Written for this because a full client costs more than what it calls, which would flatter us: the frames of one call are made
with a few concatenations, and of the answer only the frames' headers are looked at.

Sources: RFC 9113 (HTTP/2), RFC 7541 (HPACK; only literals that are not indexed, so that there is no state), the gRPC document
"gRPC over HTTP2".
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW = (1 << 31) - 1
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 4, 5
_LARGEST_FRAME = (1 << 24) - 1


class Refused(Exception):
    """The server answered with an error."""


def varint(number: int) -> bytes:
    """``number``, not negative, as protobuf writes it."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


def text(number: int, value: str | bytes) -> bytes:
    """The field ``number`` of a protobuf message, a string or message; nothing where it is empty."""
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content if content else b""


def string_map(number: int, pairs: Mapping[str, str]) -> bytes:
    """The field ``number`` of a protobuf message, a map of strings."""
    return b"".join(text(number, text(1, key) + text(2, value)) for key, value in pairs.items())


def fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number and value, in order.  Knows no fixed-size numbers, which nobody sends here."""
    found: list[tuple[int, int | bytes]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            found.append((tag >> 3, number()))
        else:
            assert tag & 7 == 2, f"a field of type {tag & 7}"
            length = number()
            found.append((tag >> 3, message[at : at + length]))
            at += length
    return found


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    assert max(len(name), len(value)) < 127, "longer ones take more than one byte for their length"
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


class Connection:
    """One connection to a gRPC server on the unix socket ``address``; ``metadata`` goes with each call."""

    def __init__(self, address: str, metadata: Mapping[str, str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(120)
        self._socket.connect(address)
        self._socket.settimeout(None)
        self._buffer = bytearray()
        self._stream = -1
        self._common = _literal(b":method", b"POST") + _literal(b":scheme", b"http") + _literal(b":authority", b"localhost")
        self._rest = _literal(b"content-type", b"application/grpc") + _literal(b"te", b"trailers")
        for name, value in metadata.items():
            self._rest += _literal(name.encode(), value.encode())
        self._headers: dict[str, bytes] = {}
        settings = struct.pack(">HIHI", _INITIAL_WINDOW_SIZE, _WINDOW, _MAX_FRAME_SIZE, _LARGEST_FRAME)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + self._more_window(_WINDOW - 65535))
        self._received = 0

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def _more_window(size: int) -> bytes:
        return _frame(_WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big"))

    def call(self, path: str, request: bytes) -> bytes:
        """Call the method ``path`` with the message ``request``: the answer's messages, each behind its five bytes of prefix.

        Raises Refused unless there was one.
        """
        self._stream += 2
        stream = self._stream
        headers = self._headers.get(path)
        if headers is None:
            headers = self._headers[path] = self._common + _literal(b":path", path.encode()) + self._rest
        message = b"\0" + len(request).to_bytes(4, "big") + request
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, headers) + _frame(_DATA, _END_STREAM, stream, message))
        parts: list[bytes] = []
        trailers = b""
        while True:
            kind, flags, its, payload = self._read_frame()
            if kind == _DATA and its == stream:
                parts.append(payload)
                self._received += len(payload)
                if self._received > _WINDOW // 2:  # of the connection; each stream begins with a full window
                    self._socket.sendall(self._more_window(self._received))
                    self._received = 0
            elif kind == _HEADERS and its == stream:
                trailers = payload
                if flags & _END_STREAM:
                    break
            elif kind == _SETTINGS and not flags & _ACK:
                self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _PING and not flags & _ACK:
                self._socket.sendall(_frame(_PING, _ACK, 0, payload))
            elif kind == _GOAWAY or (kind == _RST_STREAM and its == stream):
                raise Refused(f"{path}: the server ended the {'stream' if kind == _RST_STREAM else 'connection'}: {payload!r}")
        if not parts:
            raise Refused(f"{path}: no answer but these trailers (HPACK): {trailers!r}")
        return b"".join(parts)

    def _read_frame(self) -> tuple[int, int, int, bytes]:
        head = self._read(9)
        return head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF, self._read(int.from_bytes(head[:3], "big"))

    def _read(self, size: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < size:
            received = self._socket.recv(1 << 18)
            if not received:
                raise Refused("the server closed the connection")
            buffer += received
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken


def messages(answer: bytes) -> list[bytes]:
    """The messages of an answer without their prefixes."""
    found = []
    at = 0
    while at < len(answer):
        length = int.from_bytes(answer[at + 1 : at + 5], "big")
        found.append(answer[at + 5 : at + 5 + length])
        at += 5 + length
    return found
