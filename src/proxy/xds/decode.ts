/** Bytes of a resource to what the engine takes. */
import protobuf from 'protobufjs/minimal.js';
import { AUTHORIZATION_TYPE, type TypeUrl } from '../../mesh/control-plane.js';
import { istio } from '../../mesh/proto/generated.js';
import type { EnginePolicy, EngineService, EngineWorkload } from '../engine.js';
import { ResourceError } from './checks.js';
import { convertPolicy } from './convert-policy.js';
import { convertService } from './convert-service.js';
import { convertWorkload } from './convert-workload.js';

/** A converted resource and the key under which the engine knows it. */
export type Converted =
  | { readonly kind: 'workload'; readonly key: string; readonly value: EngineWorkload }
  | { readonly kind: 'service'; readonly key: string; readonly value: EngineService }
  | { readonly kind: 'policy'; readonly key: string; readonly value: EnginePolicy };

/** @throws Error with the reason for the controller where the bytes are no such message or cannot be used */
export function convertResource(type: TypeUrl, bytes: Uint8Array): Converted {
  const reader = protobuf.Reader.create(bytes);
  if (type === AUTHORIZATION_TYPE) {
    // Fields that are newer than this program are kept, so that a policy that uses them is recognised.
    reader.discardUnknown = false;
    const value = convertPolicy(istio.security.Authorization.decode(reader));
    return { kind: 'policy', key: `${value.namespace}/${value.name}`, value };
  }
  const address = istio.workload.Address.decode(reader);
  if (address.workload) {
    const value = convertWorkload(address.workload);
    return { kind: 'workload', key: value.uid, value };
  }
  if (address.service) {
    const value = convertService(address.service);
    return { kind: 'service', key: `${value.namespace}/${value.hostname}`, value };
  }
  throw new ResourceError('the address is neither a workload nor a service');
}
