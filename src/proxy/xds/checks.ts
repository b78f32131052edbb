/** Checks that conversions of xDS resources share; a failed one becomes the reason of a NACK. */

/** A resource that cannot be used as it is; the message is for the controller's log. */
export class ResourceError extends Error {}

/** An address of 4 or 16 bytes, copied out of the message it came in. */
export function checkAddress(bytes: Uint8Array | null | undefined, where: string): Uint8Array {
  const length = bytes?.length ?? 0;
  if (!bytes || (length !== 4 && length !== 16)) throw new ResourceError(`${where} has ${length} bytes, not 4 or 16`);
  return Uint8Array.from(bytes);
}

export function checkPort(port: number | null | undefined, where: string): number {
  const value = port ?? 0;
  if (value > 65_535) throw new ResourceError(`${where} is ${value}, above 65535`);
  return value;
}

/** A number of an enumeration whose values are 0..highest. */
export function checkEnum(value: number | null | undefined, highest: number, where: string): number {
  const number = value ?? 0;
  if (number < 0 || number > highest) throw new ResourceError(`${where} has the unknown value ${number}`);
  return number;
}

export function checkNotEmpty(value: string | null | undefined, where: string): string {
  if (!value) throw new ResourceError(`${where} is empty`);
  return value;
}
