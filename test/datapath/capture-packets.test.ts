/** The guard packet by packet, good and malformed, through the kernel's test run of the attached program. */

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { CaptureLab, run } from './capture/lab.ts';

const SYN = 0x02;
const RST = 0x04;
const ACK = 0x10;
const SYN_ACK = 0x12;
const FIN_ACK = 0x11;
const TCP = 6;
const UDP = 17;
const ICMP = 1;
const ICMP6 = 58;

function ethernet(type: number, payload: Buffer): Buffer {
  const header = Buffer.alloc(14, 2);
  header.writeUInt16BE(type, 12);
  return Buffer.concat([header, payload]);
}

function tcp(flags: number, payload = '', offset = 5): Buffer {
  const header = Buffer.alloc(20);
  header.writeUInt16BE(40000, 0);
  header.writeUInt16BE(443, 2);
  header[12] = offset << 4;
  header[13] = flags;
  return Buffer.concat([header, Buffer.from(payload)]);
}

interface Ip4 {
  readonly fragment?: number;
  readonly length?: number;
  readonly first?: number;
  readonly options?: number;
}

function ip4(protocol: number, payload: Buffer, extra: Ip4 = {}): Buffer {
  const options = extra.options ?? 0;
  const header = Buffer.alloc(20 + options, 1);
  header[0] = extra.first ?? 0x40 | (5 + options / 4);
  header.writeUInt16BE(extra.length ?? header.length + payload.length, 2);
  header.writeUInt16BE(extra.fragment ?? 0, 6);
  header[9] = protocol;
  Buffer.from([10, 231, 0, 2, 10, 231, 0, 9]).copy(header, 12);
  return ethernet(0x0800, Buffer.concat([header, payload]));
}

function ip6(next: number, payload: Buffer, length = payload.length, version = 0x60): Buffer {
  const header = Buffer.alloc(40);
  header[0] = version;
  header.writeUInt16BE(length, 4);
  header[6] = next;
  return ethernet(0x86dd, Buffer.concat([header, payload]));
}

/** An IPv6 extension header of 8 bytes before the payload. */
function extension(next: number, payload: Buffer, length = 0): Buffer {
  return Buffer.concat([Buffer.from([next, length, 0, 0, 0, 0, 0, 0]), payload]);
}

const udp = Buffer.alloc(12, 7);
const CASES: readonly (readonly [verdict: 'pass' | 'drop', name: string, frame: Buffer])[] = [
  ['drop', 'SYN', ip4(TCP, tcp(SYN))],
  ['drop', 'SYN with data', ip4(TCP, tcp(SYN, 'data'))],
  ['drop', 'SYN with FIN', ip4(TCP, tcp(SYN | 1))],
  ['pass', 'SYN-ACK', ip4(TCP, tcp(SYN_ACK))],
  ['drop', 'SYN-ACK with data', ip4(TCP, tcp(SYN_ACK, 'data'))],
  ['pass', 'ACK', ip4(TCP, tcp(ACK))],
  ['drop', 'ACK with data', ip4(TCP, tcp(ACK, 'x'))],
  ['pass', 'FIN', ip4(TCP, tcp(FIN_ACK))],
  ['drop', 'FIN with data', ip4(TCP, tcp(FIN_ACK, 'x'))],
  ['pass', 'RST', ip4(TCP, tcp(RST))],
  ['drop', 'RST with data', ip4(TCP, tcp(RST, 'x'))],
  ['drop', 'data without flags', ip4(TCP, tcp(0, 'x'))],
  ['pass', 'ACK behind IPv4 options', ip4(TCP, tcp(ACK), { options: 8 })],
  ['drop', 'SYN behind IPv4 options', ip4(TCP, tcp(SYN), { options: 40 })],
  ['drop', 'first fragment of TCP', ip4(TCP, tcp(ACK), { fragment: 0x2000 })],
  ['drop', 'later fragment of TCP', ip4(TCP, tcp(ACK), { fragment: 5 })],
  ['pass', 'TCP that must not be fragmented', ip4(TCP, tcp(ACK), { fragment: 0x4000 })],
  ['drop', 'TCP header longer than the packet', ip4(TCP, tcp(ACK, '', 15))],
  ['drop', 'TCP header shorter than a TCP header', ip4(TCP, tcp(ACK, '', 4))],
  ['drop', 'half a TCP header', ip4(TCP, tcp(ACK).subarray(0, 10))],
  ['drop', 'length 0 as in jumbograms', ip4(TCP, tcp(ACK), { length: 0 })],
  ['drop', 'length shorter than the header', ip4(TCP, tcp(ACK), { length: 12 })],
  ['drop', 'IPv4 header shorter than one', ip4(TCP, tcp(ACK), { first: 0x44 })],
  ['drop', 'IPv4 of another version', ip4(TCP, tcp(ACK), { first: 0x65 })],
  ['pass', 'UDP', ip4(UDP, udp)],
  ['pass', 'fragment of UDP', ip4(UDP, udp, { fragment: 0x2000 })],
  ['pass', 'ICMP', ip4(ICMP, udp)],
  ['drop', 'IPv6 SYN', ip6(TCP, tcp(SYN))],
  ['pass', 'IPv6 ACK', ip6(TCP, tcp(ACK))],
  ['drop', 'IPv6 ACK with data', ip6(TCP, tcp(ACK, 'x'))],
  ['drop', 'IPv6 length 0', ip6(TCP, tcp(ACK), 0)],
  ['drop', 'IPv6 of another version', ip6(TCP, tcp(ACK), 20, 0x40)],
  ['drop', 'SYN behind hop-by-hop options', ip6(0, extension(TCP, tcp(SYN)))],
  ['pass', 'ACK behind destination options', ip6(60, extension(TCP, tcp(ACK)))],
  ['drop', 'data behind three extensions', ip6(0, extension(60, extension(43, extension(TCP, tcp(ACK, 'x')))))],
  ['drop', 'SYN behind an authentication header', ip6(51, extension(TCP, tcp(SYN)))],
  ['drop', 'IPv6 fragment of TCP', ip6(44, extension(TCP, tcp(ACK)))],
  ['drop', 'IPv6 fragment of more extensions', ip6(44, extension(60, extension(TCP, tcp(ACK))))],
  ['pass', 'IPv6 fragment of UDP', ip6(44, extension(UDP, udp))],
  ['drop', 'extension longer than the packet', ip6(60, extension(TCP, tcp(ACK), 200))],
  [
    'drop',
    'nine extensions',
    ip6(
      60,
      Array.from({ length: 9 }).reduce<Buffer>((b) => extension(60, b), tcp(ACK)),
    ),
  ],
  ['drop', 'IPv4 in IPv4', ip4(4, ip4(TCP, tcp(SYN)).subarray(14))],
  ['drop', 'IPv6 in IPv4', ip4(41, ip6(TCP, tcp(SYN)).subarray(14))],
  ['drop', 'GRE', ip4(47, Buffer.concat([Buffer.from([0, 0, 8, 0]), ip4(TCP, tcp(SYN)).subarray(14)]))],
  ['drop', 'MPLS in IPv4', ip4(137, Buffer.alloc(40))],
  ['drop', 'IPv4 in IPv6', ip6(4, ip4(TCP, tcp(SYN)).subarray(14))],
  ['drop', 'IPv6 in IPv6 behind a routing header', ip6(43, extension(41, ip6(TCP, tcp(SYN)).subarray(14)))],
  ['pass', 'SCTP', ip4(132, udp)],
  ['pass', 'neighbour discovery', ip6(ICMP6, udp)],
  ['pass', 'IPv6 UDP', ip6(UDP, udp)],
  ['pass', 'ARP', ethernet(0x0806, Buffer.alloc(28))],
  [
    'drop',
    'a VLAN around a SYN',
    ethernet(0x8100, Buffer.concat([Buffer.from([0, 1, 8, 0]), ip4(TCP, tcp(SYN)).subarray(14)])),
  ],
  ['drop', 'MPLS', ethernet(0x8847, Buffer.alloc(40))],
  ['drop', 'an 802.3 length', ethernet(0x0040, Buffer.alloc(64))],
];

describe('the guard', () => {
  let lab: CaptureLab;
  let program: number;

  beforeAll(() => {
    lab = new CaptureLab();
    const capture = lab.open();
    const pod = lab.addPod('a', '10.231.0.2', 'fd31::2');
    const known = programs();
    capture.activate(pod.pod);
    const added = programs().filter((id) => !known.includes(id));
    expect(added).toHaveLength(1);
    program = added[0] as number;
  });
  afterAll(async () => await lab?.remove());

  function programs(): number[] {
    const all = JSON.parse(run('bpftool', '-j', 'prog', 'list')) as { id: number; name?: string }[];
    return all.filter(({ name }) => name === 'ebb_guard').map(({ id }) => id);
  }

  it.each(CASES)('%s: %s', (verdict, _name, frame) => {
    const file = join(lab.directory, 'frame');
    writeFileSync(file, frame);
    const result = JSON.parse(run('bpftool', '-j', 'prog', 'run', 'id', `${program}`, 'data_in', file)) as {
      retval: number;
    };
    expect(result.retval).toBe(verdict === 'drop' ? 2 : 0xffffffff);
  });
});
