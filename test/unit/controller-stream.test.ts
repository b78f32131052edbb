/** One stream's responses, without its transport. */
import { expect, test } from 'vitest';
import { makeResource, ResourceStore } from '../../src/controller/store.ts';
import { XdsStream } from '../../src/controller/stream.ts';
import { envoy } from '../../src/mesh/proto/generated.js';
import { ADDRESS, AUTHORIZATION } from '../lib/xds-client.ts';

const { DeltaDiscoveryRequest, DeltaDiscoveryResponse } = envoy.service.discovery.v3;

test('a response of any number of resources says all of each, also what takes more bytes than characters', () => {
  const resources = Array.from({ length: 1234 }, (_, n) =>
    makeResource(`€/${n}${'ü'.repeat(n % 300)}`, Buffer.from('content'.repeat(n % 90)), [`€${'ü'.repeat(n)}`]),
  );
  const store = new ResourceStore();
  store.commit(new Map(resources.map((resource) => [resource.name, resource])), 1);
  const authorizations = new ResourceStore();
  authorizations.commit(new Map(), 1);
  const told = (names: readonly string[]): object[] => {
    const sent: Uint8Array[] = [];
    const stream = new XdsStream(
      { [ADDRESS]: store, [AUTHORIZATION]: authorizations },
      (response) => void sent.push(response),
      { subscribed() {}, pushed() {}, rejected() {}, failed() {} },
    );
    const request = (typeUrl: string, resourceNamesSubscribe: readonly string[]) =>
      stream.receive(DeltaDiscoveryRequest.fromObject({ typeUrl, resourceNamesSubscribe }));
    request(AUTHORIZATION, []);
    const { nonce } = DeltaDiscoveryResponse.decode(sent[0] ?? new Uint8Array());
    const ack = { typeUrl: AUTHORIZATION, responseNonce: nonce };
    stream.receive(DeltaDiscoveryRequest.fromObject(ack));
    request(ADDRESS, names);
    stream.close();
    expect(sent).toHaveLength(2);
    const response = DeltaDiscoveryResponse.decode(sent[1] ?? new Uint8Array());
    expect(response.typeUrl).toBe(ADDRESS);
    expect(response.nonce).not.toBe('');
    return (response.resources ?? []).map(({ name, version, aliases, resource }) => ({
      name,
      version,
      aliases,
      type: resource?.type_url,
      value: Buffer.from(resource?.value ?? []).toString(),
    }));
  };
  const expected = (aliased: boolean) =>
    resources.map(({ name, version, aliases, value }) => ({
      name,
      version,
      aliases: aliased ? aliases : [],
      type: ADDRESS,
      value: Buffer.from(value).toString(),
    }));
  expect(told([])).toEqual(expected(false));
  expect(told(resources.map(({ name }) => name))).toEqual(expected(true));
  expect(told(resources.slice(0, 3).map(({ name }) => name))).toEqual(expected(true).slice(0, 3));
});
