/** Certificates in PEM text (RFC 7468). */

/**
 * Every certificate block of a text, in order, as it is written there. Text between blocks and other kinds of blocks are
 * passed over. A block ends at the first END line; whether what is in it is a certificate, X509Certificate tells.
 */
export function splitPem(text: string): string[] {
  return text.match(/-----BEGIN CERTIFICATE-----[\s\S]+?-----END CERTIFICATE-----/g) ?? [];
}
