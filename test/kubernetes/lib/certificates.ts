/** Keys and certificates of a cluster's API server, made by openssl in the cluster's own directory. */
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { must } from '../../../src/lab/exec.ts';

/** Paths of PEM files. */
export interface ClusterCertificates {
  /** CA that signed the API server's certificate; what pods get as `ca.crt`. */
  readonly ca: string;
  readonly serverCertificate: string;
  readonly serverKey: string;
  /** Signs and verifies service account tokens. */
  readonly serviceAccountKey: string;
}

/** @param names subject alternative names of the API server, as openssl writes them (`DNS:kubernetes`, `IP:10.96.0.1`) */
export async function makeCertificates(directory: string, names: readonly string[]): Promise<ClusterCertificates> {
  const file = (name: string): string => join(directory, name);
  const certificates = {
    ca: file('ca.pem'),
    serverCertificate: file('server.pem'),
    serverKey: file('server-key.pem'),
    serviceAccountKey: file('service-account-key.pem'),
  };
  if (existsSync(certificates.serviceAccountKey)) return certificates;
  const ec = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'];
  await must(
    ['openssl', 'req', '-x509', ...ec, '-keyout', file('ca-key.pem'), '-out', certificates.ca, '-days', '30'].concat([
      '-subj',
      '/CN=lab ca',
      '-addext',
      'keyUsage=critical,keyCertSign',
    ]),
  );
  writeFileSync(file('server.ext'), `subjectAltName=${names.join(',')}\nextendedKeyUsage=serverAuth\n`);
  const request = file('server.csr');
  await must(['openssl', 'req', ...ec, '-keyout', certificates.serverKey, '-out', request, '-subj', '/CN=apiserver']);
  await must(
    ['openssl', 'x509', '-req', '-in', request, '-CA', certificates.ca, '-CAkey', file('ca-key.pem')].concat([
      '-CAcreateserial',
      '-days',
      '30',
      '-extfile',
      file('server.ext'),
      '-out',
      certificates.serverCertificate,
    ]),
  );
  await must(['openssl', 'genrsa', '-out', certificates.serviceAccountKey, '2048']);
  return certificates;
}
