/** IP addresses and CIDR blocks as bytes, as WDS and policies carry them. */
import ipaddr from 'ipaddr.js';

export interface Cidr {
  /** 4 or 16 bytes, host bits zero. */
  readonly address: Uint8Array;
  readonly length: number;
}

const PLAIN_V4 = /^\d{1,3}(\.\d{1,3}){3}$/;

/** Parses an address strictly (no octal, no short forms, no zone); `::ffff:1.2.3.4` becomes IPv4. */
function parse(text: string): ipaddr.IPv4 | ipaddr.IPv6 | undefined {
  if (PLAIN_V4.test(text)) {
    if (text.split('.').some((part) => part.length > 1 && part.startsWith('0'))) return undefined;
    return ipaddr.IPv4.isValid(text) ? ipaddr.IPv4.parse(text) : undefined;
  }
  if (!text.includes(':') || text.includes('%') || !ipaddr.IPv6.isValid(text)) return undefined;
  const address = ipaddr.IPv6.parse(text);
  return address.isIPv4MappedAddress() ? address.toIPv4Address() : address;
}

/** The bytes of an IP address, or undefined where the text is none. */
export function parseIp(text: string): Uint8Array | undefined {
  const address = parse(text);
  return address === undefined ? undefined : Uint8Array.from(address.toByteArray());
}

/** The canonical text of an address that {@link parseIp} gave. */
export function formatIp(bytes: Uint8Array): string {
  return ipaddr.fromByteArray([...bytes]).toString();
}

/** A CIDR block, or a single address; undefined where the text is neither. Host bits are cleared. */
export function parseCidr(text: string): Cidr | undefined {
  const [host = '', prefix, ...rest] = text.split('/');
  if (rest.length > 0) return undefined;
  const address = parse(host);
  if (address === undefined) return undefined;
  const bits = address.toByteArray().length * 8;
  // A mapped block would lose 96 bits of its prefix: nobody writes one, so it is refused rather than guessed.
  if (prefix !== undefined && bits === 32 && host.includes(':')) return undefined;
  if (prefix !== undefined && !/^\d{1,3}$/.test(prefix)) return undefined;
  const length = prefix === undefined ? bits : Number(prefix);
  if (length > bits) return undefined;
  const bytes = Uint8Array.from(address.toByteArray());
  for (const [index, byte] of bytes.entries()) {
    const keep = Math.min(8, Math.max(0, length - index * 8));
    bytes[index] = byte & (0xff << (8 - keep)) & 0xff;
  }
  return { address: bytes, length };
}
