/** How the proxy names itself to the controller: xDS Node, as ztunnel does (istiod goes by the `ztunnel` prefix). */
import type { envoy, google } from '../../mesh/proto/generated.js';
import type { ProxySettings } from '../settings.js';

type Value = google.protobuf.Value.$Properties;
type Node = envoy.service.discovery.v3.Node.$Properties;

export function xdsNode(
  settings: Pick<ProxySettings, 'nodeName' | 'podName' | 'podNamespace' | 'instanceIp' | 'metadata'>,
): Node {
  const { nodeName, podName, podNamespace, instanceIp } = settings;
  const metadata = new Map<string, unknown>([
    ...settings.metadata,
    ['NAME', podName],
    ['NAMESPACE', podNamespace],
    ['INSTANCE_IPS', instanceIp],
    ['NODE_NAME', nodeName],
  ]);
  return {
    id: `ztunnel~${instanceIp}~${podName}.${podNamespace}~${podNamespace}.svc.cluster.local`,
    metadata: { fields: Object.fromEntries([...metadata].map(([name, value]) => [name, toValue(value)])) },
  };
}

/** A JSON value as google.protobuf.Value. */
export function toValue(json: unknown): Value {
  if (typeof json === 'string') return { stringValue: json };
  if (typeof json === 'number') return { numberValue: json };
  if (typeof json === 'boolean') return { boolValue: json };
  if (Array.isArray(json)) return { listValue: { values: json.map(toValue) } };
  if (typeof json === 'object' && json !== null) {
    return {
      structValue: { fields: Object.fromEntries(Object.entries(json).map(([name, value]) => [name, toValue(value)])) },
    };
  }
  return { nullValue: 0 };
}
