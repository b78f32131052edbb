"""Hand-made packets: `raw.py KIND SOURCE DESTINATION PORT GATEWAY_MAC TEXT` sends a SYN, a SYN with the text as payload, and a
segment with the text of a connection that never was, from port 40001. Prints how many the kernel took."""

import socket
import struct
import sys

PACKET_QDISC_BYPASS = 20
SYN, PSH_ACK = 0x02, 0x18
SOURCE_PORT = 40001


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp(source, destination, port, flags, payload):
    def header(total):
        return struct.pack("!HHIIBBHHH", SOURCE_PORT, port, 1000, 1 if flags & 0x10 else 0, 5 << 4, flags, 1000, total, 0)

    length = struct.pack("!HH", 6, 20 + len(payload)) if len(source) == 4 else struct.pack("!II", 20 + len(payload), 6)
    return header(checksum(source + destination + length + header(0) + payload)) + payload


def ip4(source, destination, payload, protocol=6, fragment=0):
    def header(total):
        return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, fragment, 64, protocol, total) + source + destination

    return header(checksum(header(0))) + payload


def ip6(source, destination, payload, following=6):
    return struct.pack("!IHBB", 6 << 28, len(payload), following, 64) + source + destination + payload


def packets(kind, source, destination, segment):
    """The IP packets of a segment: plain, in two fragments, or in another IP packet."""
    if len(source) == 16:
        if kind == "options":
            yield ip6(source, destination, struct.pack("!BBHI", 6, 0, 0x0104, 0) + segment, 60)
        else:
            yield ip6(source, destination, segment)
    elif kind == "fragments":
        yield ip4(source, destination, segment[:8], fragment=0x2000)
        yield ip4(source, destination, segment[8:], fragment=1)
    elif kind == "ipip":
        yield ip4(source, destination, ip4(source, destination, segment), protocol=4)
    else:
        yield ip4(source, destination, segment)


def sender(kind, family, destination, mac):
    """A function that sends one IP packet."""
    if kind in ("raw", "ipip", "fragments", "options"):
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        return lambda packet: raw.sendto(packet, (destination, 0))
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind(("eth0", 0))
    if kind == "bypass":
        link.setsockopt(263, PACKET_QDISC_BYPASS, 1)
    own = link.getsockname()[4]
    ethertype = struct.pack("!H", 0x0800 if family == socket.AF_INET else 0x86DD)
    tag = struct.pack("!HH", 0x8100, 7) if kind == "vlan" else b""
    return lambda packet: link.send(bytes.fromhex(mac.replace(":", "")) + own + tag + ethertype + packet)


kind, source, destination, port, mac, text = sys.argv[1:]
family = socket.AF_INET6 if ":" in source else socket.AF_INET
addresses = socket.inet_pton(family, source), socket.inet_pton(family, destination)
send, sent = sender(kind, family, destination, mac), 0
for flags, payload in ((SYN, b""), (SYN, text.encode()), (PSH_ACK, text.encode())):
    for packet in packets(kind, *addresses, tcp(*addresses, int(port), flags, payload)):
        sent += send(packet) > 0
print(sent)
