/** Findings about the controller and about clocks: both take a connection to the controller. */
import { type ClockOffset, roughly } from '../../mesh/clock.js';
import { HARMFUL_SKEW_MS, isSkewed } from '../../mesh/clock-skew.js';
import { askTime, offsetByCertificate, type ServerTime } from '../../mesh/server-time.js';
import { readRoots } from '../../proxy/control-plane.js';
import { parseEndpoint } from '../../proxy/settings.js';
import { type Finding, failed, notTried, ok, warning } from './finding.js';

/** Another's clock and whose it is. */
export interface Told {
  readonly of: string;
  readonly offset: ClockOffset;
}

export interface ControllerOptions {
  /** As the proxy has XDS_ADDRESS; undefined: none is known. */
  readonly address: string | undefined;
  /** As the proxy has XDS_ROOT_CA. */
  readonly rootCa: string;
  readonly altHostname: string;
}

export interface ControllerFindings {
  readonly finding: Finding;
  readonly told: readonly Told[];
  /** PEM by which it was verified. */
  readonly roots: string | undefined;
}

/** Asks the controller that a proxy of this environment would ask. */
export async function controllerFinding({
  address,
  rootCa,
  altHostname,
}: ControllerOptions): Promise<ControllerFindings> {
  if (address === undefined) {
    const why = 'XDS_ADDRESS is not set, so no controller is known here';
    const hint = "set XDS_ADDRESS and XDS_ROOT_CA as for the proxy, or run it in the proxy's container";
    return { finding: notTried('CONTROLLER', why, hint), told: [], roots: undefined };
  }
  try {
    const endpoint = parseEndpoint(address);
    const roots = readRoots(rootCa);
    const time = await askTime({ ...endpoint, roots, altHostname });
    const offset = time.offset ?? offsetByCertificate(time, Date.now());
    const told = offset === undefined ? [] : [{ of: 'the controller', offset }];
    return { finding: judgeCertificate(address, time, Date.now()), told, roots };
  } catch (error) {
    const hint = 'check XDS_ADDRESS, that the controller runs, and that XDS_ROOT_CA holds its root';
    return {
      finding: failed('CONTROLLER', `${address}: ${(error as Error).message}`, hint),
      told: [],
      roots: undefined,
    };
  }
}

function judgeCertificate(address: string, { notBeforeMs, notAfterMs }: ServerTime, nowMs: number): Finding {
  const hint = 'see CLOCK_SKEW; until then no proxy of this machine can reach the controller';
  if (nowMs < notBeforeMs) {
    return failed(
      'CONTROLLER',
      `${address}: by the clock here its certificate is not valid for another ${roughly(notBeforeMs - nowMs)}`,
      hint,
    );
  }
  if (nowMs > notAfterMs) {
    return failed(
      'CONTROLLER',
      `${address}: by the clock here its certificate ended ${roughly(nowMs - notAfterMs)} ago`,
      hint,
    );
  }
  return ok('CONTROLLER', `${address}, its certificate is valid for another ${roughly(notAfterMs - nowMs)}`);
}

/** @param told everybody's clock that was asked */
export function clockFinding(told: readonly Told[]): Finding {
  const hint =
    'set this clock or theirs (NTP, such as chrony): certificates and tokens are judged by it; nothing has to be restarted then';
  const list = told.map(
    ({ of, offset }) =>
      `${roughly(offset.offsetMs)} ${offset.offsetMs > 0 ? 'behind' : 'ahead of'} ${of} (to ${roughly(Math.max(1000, offset.uncertaintyMs))})`,
  );
  const skewed = told.filter(({ offset }) => isSkewed(offset));
  if (skewed.some(({ offset }) => Math.abs(offset.offsetMs) >= HARMFUL_SKEW_MS)) {
    return failed('CLOCK_SKEW', `clock skew: this machine is ${list.join(', ')}`, hint);
  }
  if (skewed.length > 0) return warning('CLOCK_SKEW', `clock skew: this machine is ${list.join(', ')}`, hint);
  if (told.length === 0)
    return notTried('CLOCK_SKEW', 'nobody could be asked for the time, see CONTROLLER and KUBERNETES_API');
  return ok(
    'CLOCK_SKEW',
    `as ${told.map(({ of }) => of).join(' and ')} to within ${roughly(Math.max(...told.map(({ offset }) => Math.abs(offset.offsetMs) + offset.uncertaintyMs)))}`,
  );
}
