// Reads plain objects field by field; JavaScript's thread only.
#include "binding_values.h"

#include <cmath>
#include <limits>

namespace ebbtide {

namespace {

constexpr double kMaxPort = 65535, kMaxUint32 = 4294967295.0, kMaxWindow = 2147483647.0;

[[noreturn]] void refuse(Napi::Env env, const Where& where, const std::string& wanted) {
  throw Napi::TypeError::New(env, where.text() + ": expected " + wanted);
}

// One field of an object, with its place.
struct Field {
  Field(const Napi::Object& object, const char* name, const Where& parent)
      : value(object.Get(name)), where{&parent, name, 0} {}
  Napi::Value value;
  Where where;
};

std::string text(const Napi::Object& object, const char* name, const Where& where) {
  const Field field(object, name, where);
  return readText(field.value, field.where);
}

double number(const Napi::Object& object, const char* name, const Where& where, double max, double min = 0) {
  const Field field(object, name, where);
  return readNumber(field.value, field.where, min, max);
}

bool flag(const Napi::Object& object, const char* name, const Where& where) {
  const Field field(object, name, where);
  if (!field.value.IsBoolean()) refuse(object.Env(), field.where, "a boolean");
  return field.value.As<Napi::Boolean>().Value();
}

// Calls `read(value, where)` for each element and collects the results. Each element has a handle scope of
// its own, so that a large push does not pile up handles.
template <typename F>
auto listOf(const Napi::Value& value, const Where& where, F read) {
  const Napi::Env env = value.Env();
  if (!value.IsArray()) refuse(env, where, "an array");
  const auto array = value.As<Napi::Array>();
  std::vector<decltype(read(value, where))> out;
  const uint32_t length = array.Length();
  for (uint32_t i = 0; i < length; ++i) {
    const Napi::HandleScope scope(env);
    out.push_back(read(array.Get(i), Where{&where, nullptr, i}));
  }
  return out;
}

template <typename F>
auto list(const Napi::Object& object, const char* name, const Where& where, F read) {
  const Field field(object, name, where);
  return listOf(field.value, field.where, read);
}

// 4 or 16 bytes; none for anything else that is a Uint8Array.
std::optional<IpAddress> bytesToIp(const Napi::Value& value, const Where& where) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    refuse(value.Env(), where, "a Uint8Array");
  }
  const auto bytes = value.As<Napi::Uint8Array>();
  if (bytes.ByteLength() == 4) return IpAddress::fromV4(bytes.Data());
  if (bytes.ByteLength() == 16) return IpAddress::fromV6(bytes.Data());
  return std::nullopt;
}

IpAddress readIp(const Napi::Value& value, const Where& where) {
  const auto ip = bytesToIp(value, where);
  if (!ip) refuse(value.Env(), where, "4 or 16 bytes");
  return *ip;
}

// A prefix length as written for `written_bytes` bytes, for the address as we store it: ::ffff:10.0.0.0/104
// is 10.0.0.0/8. None where it does not fit.
std::optional<uint8_t> canonicalLength(const IpAddress& ip, size_t written_bytes, double length) {
  if (!(length >= 0 && length <= static_cast<double>(written_bytes) * 8) || length != std::floor(length)) {
    return std::nullopt;
  }
  if (written_bytes == 16 && ip.v4) {
    if (length < 96) return std::nullopt;
    length -= 96;
  }
  return static_cast<uint8_t>(length);
}

PortMapping readPort(const Napi::Value& value, const Where& where) {
  const Napi::Object object = readObject(value, where);
  return {static_cast<uint16_t>(number(object, "servicePort", where, kMaxPort)),
          static_cast<uint16_t>(number(object, "targetPort", where, kMaxPort))};
}

GatewayAddress readGateway(const Napi::Value& value, const Where& where) {
  const Napi::Object object = readObject(value, where);
  GatewayAddress gateway;
  const Field hostname(object, "hostname", where), address(object, "address", where);
  if (!hostname.value.IsUndefined()) {
    const Napi::Object host = readObject(hostname.value, hostname.where);
    gateway.destination = GatewayAddress::Hostname{text(host, "namespace", hostname.where),
                                                   text(host, "hostname", hostname.where)};
  } else if (!address.value.IsUndefined()) {
    const Napi::Object network = readObject(address.value, address.where);
    const Field bytes(network, "address", address.where);
    gateway.destination =
        GatewayAddress::Address{text(network, "network", address.where), readIp(bytes.value, bytes.where)};
  } else {
    refuse(value.Env(), where, "a hostname or an address");
  }
  gateway.hbone_mtls_port = static_cast<uint16_t>(number(object, "hboneMtlsPort", where, kMaxPort));
  return gateway;
}

std::optional<GatewayAddress> optionalGateway(const Napi::Object& object, const char* name,
                                              const Where& where) {
  const Field field(object, name, where);
  if (field.value.IsUndefined()) return std::nullopt;
  return readGateway(field.value, field.where);
}

Workload readWorkload(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  Workload w;
  w.uid = text(o, "uid", where);
  if (w.uid.empty()) refuse(value.Env(), where, "a uid that is not empty");
  w.name = text(o, "name", where);
  w.ns = text(o, "namespace", where);
  w.addresses = list(o, "addresses", where, readIp);
  w.hostname = text(o, "hostname", where);
  w.network = text(o, "network", where);
  w.protocol = flag(o, "hbone", where) ? TunnelProtocol::kHbone : TunnelProtocol::kNone;
  w.trust_domain = text(o, "trustDomain", where);
  if (w.trust_domain.empty()) w.trust_domain = "cluster.local";
  w.service_account = text(o, "serviceAccount", where);
  w.waypoint = optionalGateway(o, "waypoint", where);
  w.network_gateway = optionalGateway(o, "networkGateway", where);
  w.node = text(o, "node", where);
  w.canonical_name = text(o, "canonicalName", where);
  w.canonical_revision = text(o, "canonicalRevision", where);
  w.workload_name = text(o, "workloadName", where);
  w.workload_type = text(o, "workloadType", where);
  if (const Field tunnel(o, "applicationTunnel", where); !tunnel.value.IsUndefined()) {
    const Napi::Object t = readObject(tunnel.value, tunnel.where);
    w.has_application_tunnel = true;
    w.application_tunnel_proxy = flag(t, "proxy", tunnel.where);
    const auto port = static_cast<uint16_t>(number(t, "port", tunnel.where, kMaxPort));
    if (port != 0) w.application_tunnel_port = port;
  }
  w.services = list(o, "services", where, [](const Napi::Value& v, const Where& at) {
    const Napi::Object service = readObject(v, at);
    return std::pair{text(service, "key", at), list(service, "ports", at, readPort)};
  });
  w.authorization_policies = list(o, "authorizationPolicies", where, readText);
  w.healthy = flag(o, "healthy", where);
  w.cluster_id = text(o, "clusterId", where);
  const Field locality(o, "locality", where);
  const Napi::Object place = readObject(locality.value, locality.where);
  w.locality = {text(place, "region", locality.where), text(place, "zone", locality.where),
                text(place, "subzone", locality.where)};
  w.host_network = flag(o, "hostNetwork", where);
  w.capacity = static_cast<uint32_t>(number(o, "capacity", where, kMaxUint32));
  return w;
}

ServiceVip readVip(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  const Field address(o, "address", where), length(o, "length", where);
  ServiceVip vip;
  vip.network = text(o, "network", where);
  vip.ip = readIp(address.value, address.where);
  const size_t bytes = address.value.As<Napi::Uint8Array>().ByteLength();
  vip.prefix_length = vip.ip.v4 ? 32 : 128;
  if (!length.value.IsUndefined()) {
    const auto canonical = canonicalLength(vip.ip, bytes, readNumber(length.value, length.where, 0, 128));
    if (!canonical) refuse(value.Env(), length.where, "a prefix length that fits the address");
    vip.prefix_length = *canonical;
  }
  return vip;
}

Service readService(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  Service s;
  s.name = text(o, "name", where);
  s.ns = text(o, "namespace", where);
  s.hostname = text(o, "hostname", where);
  s.vips = list(o, "vips", where, readVip);
  s.ports = list(o, "ports", where, readPort);
  s.subject_alt_names = list(o, "subjectAltNames", where, readText);
  s.waypoint = optionalGateway(o, "waypoint", where);
  s.weighted_waypoints = list(o, "weightedWaypoints", where, [](const Napi::Value& v, const Where& at) {
    const Napi::Object weighted = readObject(v, at);
    const Field destination(weighted, "destination", at);
    return std::pair{readGateway(destination.value, destination.where),
                     static_cast<uint32_t>(number(weighted, "weight", at, kMaxUint32))};
  });
  s.routing_preference = list(o, "routingPreference", where, [](const Napi::Value& v, const Where& at) {
    return static_cast<LbScope>(readNumber(v, at, 1, static_cast<double>(LbScope::kNetwork)));
  });
  s.lb_mode = static_cast<LbMode>(number(o, "mode", where, static_cast<double>(LbMode::kPassthrough)));
  s.allow_unhealthy = flag(o, "allowUnhealthy", where);
  s.ip_families = static_cast<uint8_t>(number(o, "ipFamilies", where, 3));
  s.canonical = flag(o, "canonical", where);
  s.namespace_visibility = flag(o, "namespaceVisibility", where);
  return s;
}

StringMatch readStringMatch(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  const std::string kind = text(o, "kind", where);
  StringMatch match;
  match.value = text(o, "value", where);
  if (kind == "exact") {
    match.kind = StringMatch::Kind::kExact;
  } else if (kind == "prefix") {
    match.kind = StringMatch::Kind::kPrefix;
  } else if (kind == "suffix") {
    match.kind = StringMatch::Kind::kSuffix;
  } else if (kind == "presence") {
    match.kind = StringMatch::Kind::kPresence;
  } else {
    refuse(value.Env(), where, "kind exact, prefix, suffix or presence");
  }
  return match;
}

ServiceAccountMatch readServiceAccount(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  return {text(o, "namespace", where), text(o, "serviceAccount", where)};
}

template <typename F>
auto attribute(const Napi::Object& object, const char* name, const Where& where, F read) {
  const Field field(object, name, where);
  const Napi::Object o = readObject(field.value, field.where);
  Attribute<typename decltype(list(o, "anyOf", field.where, read))::value_type> out;
  out.any_of = list(o, "anyOf", field.where, read);
  out.none_of = list(o, "noneOf", field.where, read);
  return out;
}

// Values that a policy's author can get wrong make the match malformed, which fails closed, rather than the
// whole push.
PolicyMatch readMatch(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  PolicyMatch match;
  match.malformed = flag(o, "malformed", where);
  const auto cidr = [&match](const Napi::Value& v, const Where& at) {
    const Napi::Object range = readObject(v, at);
    const Field address(range, "address", at), length(range, "length", at);
    const auto ip = bytesToIp(address.value, address.where);
    if (!length.value.IsNumber()) refuse(v.Env(), length.where, "a number");
    const auto canonical = ip ? canonicalLength(*ip, address.value.As<Napi::Uint8Array>().ByteLength(),
                                                length.value.As<Napi::Number>().DoubleValue())
                              : std::nullopt;
    if (!canonical) match.malformed = true;
    return canonical ? Cidr{*ip, *canonical} : Cidr{};
  };
  const auto port = [&match](const Napi::Value& v, const Where& at) {
    if (!v.IsNumber()) refuse(v.Env(), at, "a number");
    const double n = v.As<Napi::Number>().DoubleValue();
    if (n >= 0 && n <= kMaxPort && n == std::floor(n)) return static_cast<uint16_t>(n);
    match.malformed = true;
    return uint16_t{0};
  };
  match.namespaces = attribute(o, "namespaces", where, readStringMatch);
  match.principals = attribute(o, "principals", where, readStringMatch);
  match.source_ips = attribute(o, "sourceIps", where, cidr);
  match.destination_ips = attribute(o, "destinationIps", where, cidr);
  match.destination_ports = attribute(o, "destinationPorts", where, port);
  match.service_accounts = attribute(o, "serviceAccounts", where, readServiceAccount);
  return match;
}

Policy readPolicy(const Napi::Value& value, const Where& where) {
  const Napi::Object o = readObject(value, where);
  Policy p;
  p.name = text(o, "name", where);
  p.ns = text(o, "namespace", where);
  const std::string scope = text(o, "scope", where), action = text(o, "action", where);
  if (scope == "global") {
    p.scope = Policy::Scope::kGlobal;
  } else if (scope == "namespace") {
    p.scope = Policy::Scope::kNamespace;
  } else if (scope == "workload") {
    p.scope = Policy::Scope::kWorkload;
  } else {
    refuse(value.Env(), where, "scope global, namespace or workload");
  }
  if (action != "allow" && action != "deny") refuse(value.Env(), where, "action allow or deny");
  p.action = action == "deny" ? Policy::Action::kDeny : Policy::Action::kAllow;
  p.dry_run = flag(o, "dryRun", where);
  p.rules = list(o, "rules", where, [](const Napi::Value& rule, const Where& at_rule) {
    return listOf(rule, at_rule, [](const Napi::Value& clause, const Where& at_clause) {
      return listOf(clause, at_clause, readMatch);
    });
  });
  return p;
}

}  // namespace

std::string Where::text() const {
  std::string before = parent != nullptr ? parent->text() : "";
  if (name == nullptr) return before + "[" + std::to_string(index) + "]";
  return before.empty() ? name : before + "." + name;
}

std::string readText(const Napi::Value& value, const Where& where) {
  if (!value.IsString()) refuse(value.Env(), where, "a string");
  return value.As<Napi::String>().Utf8Value();
}

double readNumber(const Napi::Value& value, const Where& where, double min, double max) {
  if (!value.IsNumber()) refuse(value.Env(), where, "a number");
  const double n = value.As<Napi::Number>().DoubleValue();
  if (n >= min && n <= max && n == std::floor(n)) return n;
  throw Napi::RangeError::New(value.Env(), where.text() + ": expected a whole number from " +
                                               std::to_string(static_cast<int64_t>(min)) + " to " +
                                               std::to_string(static_cast<int64_t>(max)));
}

Napi::Object readObject(const Napi::Value& value, const Where& where) {
  if (!value.IsObject() || value.IsArray() || value.IsFunction()) refuse(value.Env(), where, "an object");
  return value.As<Napi::Object>();
}

Napi::Function readFunction(const Napi::Value& value, const Where& where) {
  if (!value.IsFunction()) refuse(value.Env(), where, "a function");
  return value.As<Napi::Function>();
}

EngineConfig readOptions(const Napi::Value& value) {
  constexpr double max_workers = 256, min_frame = 16384, max_frame = 16777215, min_window = 65535,
                   max_streams = 1e6, max_ms = 86'400'000;
  const Where where{nullptr, "options", 0};
  const Napi::Object o = readObject(value, where);
  EngineConfig config;
  config.workers = static_cast<unsigned>(number(o, "workers", where, max_workers, 1));
  config.state = {text(o, "nodeName", where), text(o, "network", where), text(o, "clusterId", where)};
  config.stream_window = static_cast<uint32_t>(number(o, "streamWindow", where, kMaxWindow, min_window));
  config.connection_window =
      static_cast<uint32_t>(number(o, "connectionWindow", where, kMaxWindow, min_window));
  config.frame_size = static_cast<uint32_t>(number(o, "frameSize", where, max_frame, min_frame));
  config.max_streams_per_connection =
      static_cast<unsigned>(number(o, "maxStreamsPerConnection", where, max_streams, 1));
  config.pool_idle = std::chrono::milliseconds(static_cast<int64_t>(number(o, "poolIdleMs", where, max_ms)));
  return config;
}

LocalPod readPod(const Napi::Value& value) {
  const Where where{nullptr, "pod", 0};
  const Napi::Object o = readObject(value, where);
  LocalPod pod;
  pod.uid = text(o, "uid", where);
  pod.name = text(o, "name", where);
  pod.ns = text(o, "namespace", where);
  pod.service_account = text(o, "serviceAccount", where);
  // Last: whatever throws before has not taken the descriptor over.
  pod.netns_fd = static_cast<int>(number(o, "netnsFd", where, std::numeric_limits<int>::max()));
  return pod;
}

CertificateBundle readBundle(const Napi::Value& value) {
  const Where where{nullptr, "bundle", 0};
  const Napi::Object o = readObject(value, where);
  return {text(o, "chainPem", where), text(o, "keyPem", where), text(o, "rootsPem", where)};
}

StateDelta readDelta(const Napi::Value& value) {
  const Where where{nullptr, "delta", 0};
  const Napi::Object o = readObject(value, where);
  StateDelta delta;
  delta.workloads = list(o, "workloads", where, readWorkload);
  delta.services = list(o, "services", where, readService);
  delta.policies = list(o, "policies", where, readPolicy);
  delta.removed_addresses = list(o, "removedAddresses", where, readText);
  delta.removed_policies = list(o, "removedPolicies", where, readText);
  return delta;
}

}  // namespace ebbtide
