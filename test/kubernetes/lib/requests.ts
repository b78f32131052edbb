/** Certificate requests and authorities that tests make, with openssl: nothing of our own judges our own. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const openssl = (directory: string, ...args: string[]): string =>
  execFileSync('openssl', args, { cwd: directory, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });

/** A PKCS#10 request of a new P-256 key. */
export function makeRequest(): string {
  const directory = mkdtempSync(join(tmpdir(), 'ebbtide-csr-'));
  try {
    const options = [
      '-newkey',
      'ec',
      '-pkeyopt',
      'ec_paramgen_curve:P-256',
      '-nodes',
      '-keyout',
      'key',
      '-subj',
      '/O=x',
    ];
    return openssl(directory, 'req', '-new', ...options);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** A root, two intermediates below it, and the files that an operator would put into the Secret `cacerts`. */
export function makePluggedAuthority(kind: 'rsa' | 'ec'): {
  readonly directory: string;
  readonly files: Readonly<Record<string, string>>;
} {
  const directory = mkdtempSync(join(tmpdir(), 'ebbtide-ca-'));
  const key = kind === 'rsa' ? ['rsa:2048'] : ['ec', '-pkeyopt', 'ec_paramgen_curve:P-384'];
  const newKey = (name: string): string[] => ['-newkey', ...key, '-nodes', '-keyout', `${name}.key`];
  const use = ['-addext', 'keyUsage=critical,keyCertSign,cRLSign'];
  openssl(directory, 'req', '-x509', ...newKey('root'), ...use, '-out', 'root.pem', '-subj', '/O=test/CN=root');
  writeFileSync(
    join(directory, 'ca.ext'),
    'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n',
  );
  let issuer = 'root';
  for (const name of ['upper', 'lower']) {
    openssl(directory, 'req', '-new', ...newKey(name), '-out', `${name}.csr`, '-subj', `/O=test/CN=${name}`);
    const by = ['-CA', `${issuer}.pem`, '-CAkey', `${issuer}.key`, '-CAcreateserial', '-days', '20'];
    openssl(directory, 'x509', '-req', '-in', `${name}.csr`, ...by, '-extfile', 'ca.ext', '-out', `${name}.pem`);
    issuer = name;
  }
  const read = (name: string): string => readFileSync(join(directory, name), 'utf8');
  return {
    directory,
    files: {
      'ca-cert.pem': read('lower.pem'),
      'ca-key.pem': read('lower.key'),
      'cert-chain.pem': read('lower.pem') + read('upper.pem') + read('root.pem'),
      'root-cert.pem': read('root.pem'),
    },
  };
}

/** What openssl says of a chain as CreateCertificate answers it: leaf, intermediates, roots. @throws where it does not verify */
export function verifyChain(chain: readonly string[]): string {
  const directory = mkdtempSync(join(tmpdir(), 'ebbtide-verify-'));
  try {
    writeFileSync(join(directory, 'leaf'), chain[0] ?? '');
    writeFileSync(join(directory, 'between'), chain.slice(1, -1).join(''));
    writeFileSync(join(directory, 'roots'), chain.at(-1) ?? '');
    const between = chain.length > 2 ? ['-untrusted', 'between'] : [];
    return openssl(directory, 'verify', '-x509_strict', '-CAfile', 'roots', ...between, 'leaf').trim();
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}
