/** The times in a bearer token, for a hint where it was refused. Whether it is good only the server decides. */

/** RFC 7519, 4.1. Milliseconds since the epoch. */
interface TokenTimes {
  readonly notBeforeMs: number | undefined;
  readonly endsMs: number | undefined;
}

/** @returns undefined where it is no JSON Web Token */
function timesOf(token: string): TokenTimes | undefined {
  const [, payload = '', signature] = token.split('.');
  if (signature === undefined) return undefined;
  try {
    const claims = JSON.parse(Buffer.from(payload, 'base64url').toString('utf8')) as Readonly<Record<string, unknown>>;
    const ms = (claim: unknown): number | undefined => (typeof claim === 'number' ? claim * 1000 : undefined);
    return { notBeforeMs: ms(claims['nbf'] ?? claims['iat']), endsMs: ms(claims['exp']) };
  } catch {
    return undefined;
  }
}

/**
 * What a token's times have to do with it that it was refused.
 * @param nowMs by the clock here
 * @returns "" where they have nothing to do with it, as far as it is seen here
 */
export function timeHint(token: string, nowMs: number): string {
  const times = timesOf(token);
  const told = (ms: number): string => new Date(ms).toISOString();
  if (times?.endsMs !== undefined && times.endsMs <= nowMs) {
    return `by the clock here (${told(nowMs)}) the token ended at ${told(times.endsMs)}: it was not renewed in its file, or clock skew`;
  }
  if (times?.notBeforeMs !== undefined && times.notBeforeMs > nowMs) {
    return `by the clock here (${told(nowMs)}) the token is not valid before ${told(times.notBeforeMs)}: clock skew`;
  }
  return '';
}
