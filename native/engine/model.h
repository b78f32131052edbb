// What the engine knows of the mesh: addresses, workloads, services, policies. Plain immutable values; field
// meanings are those of WDS (workload.proto) and authorization.proto. No napi.h, no sockets.
#pragma once

#include <array>
#include <atomic>
#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace ebbtide {

// An IPv4 or IPv6 address. IPv4-mapped IPv6 (::ffff:a.b.c.d) is always stored as IPv4, so equal addresses
// compare equal.
struct IpAddress {
  bool v4 = true;
  std::array<uint8_t, 16> bytes{};  // network order; an IPv4 address uses the first four, the rest are zero

  static IpAddress fromV4(const void* four_bytes);
  static IpAddress fromV6(const void* sixteen_bytes);  // canonicalises mapped addresses
  static std::optional<IpAddress> parse(const std::string& text);
  std::string toString() const;
  bool isLoopback() const;
  auto operator<=>(const IpAddress&) const = default;
};

struct SocketAddress {
  IpAddress ip;
  uint16_t port = 0;  // host order

  std::string toString() const;  // 10.0.0.1:80, [::1]:80
  auto operator<=>(const SocketAddress&) const = default;
};

// spiffe://<trust_domain>/ns/<ns>/sa/<service_account>
struct Identity {
  std::string trust_domain;
  std::string ns;
  std::string service_account;

  static std::optional<Identity> parse(const std::string& spiffe_uri);
  std::string uri() const;
  std::string principal() const;  // the URI without "spiffe://", as policies compare it
  auto operator<=>(const Identity&) const = default;
};

enum class TunnelProtocol : uint8_t { kNone, kHbone };

struct PortMapping {
  uint16_t service_port = 0;
  uint16_t target_port = 0;  // 0: named port, see the endpoint's own mapping
};

struct GatewayAddress {
  // {namespace, hostname} or {network, address}
  struct Hostname {
    std::string ns, hostname;
  };
  struct Address {
    std::string network;
    IpAddress ip;
  };
  std::variant<Hostname, Address> destination;
  uint16_t hbone_mtls_port = 0;
};

struct Locality {
  std::string region, zone, subzone;
};

// Live connections to one endpoint, shared by all workers; the load balancer compares these.
struct EndpointLoad {
  std::atomic<int32_t> connections{0};
};

struct Workload {
  std::string uid;
  std::string name, ns;
  std::vector<IpAddress> addresses;
  std::string hostname;
  std::string network;
  TunnelProtocol protocol = TunnelProtocol::kNone;
  std::string trust_domain;  // never empty: "cluster.local" where WDS left it out
  std::string service_account;
  std::optional<GatewayAddress> waypoint, network_gateway;
  std::string node;
  std::string canonical_name, canonical_revision, workload_name,
      workload_type;  // type: deployment|cronjob|pod|job
  bool application_tunnel_proxy = false;
  std::optional<uint16_t> application_tunnel_port;
  bool has_application_tunnel = false;
  std::vector<std::pair<std::string, std::vector<PortMapping>>> services;  // key namespace/hostname
  std::vector<std::string> authorization_policies;                         // keys namespace/name
  bool healthy = true;
  std::string cluster_id;
  Locality locality;
  bool host_network = false;
  uint32_t capacity = 1;
  std::shared_ptr<EndpointLoad> load;  // kept across updates of the same uid

  Identity identity() const { return {trust_domain, ns, service_account}; }
};

enum class LbScope : uint8_t { kRegion = 1, kZone, kSubzone, kNode, kCluster, kNetwork };
enum class LbMode : uint8_t { kUnspecified, kStrict, kFailover, kPassthrough };

struct ServiceVip {
  std::string network;
  IpAddress ip;
  uint8_t prefix_length = 32;  // 32 or 128 for a single address
};

struct Service {
  std::string name, ns, hostname;
  std::vector<ServiceVip> vips;
  std::vector<PortMapping> ports;
  std::vector<std::string> subject_alt_names;
  std::optional<GatewayAddress> waypoint;
  std::vector<std::pair<GatewayAddress, uint32_t>> weighted_waypoints;
  std::vector<LbScope> routing_preference;
  LbMode lb_mode = LbMode::kUnspecified;
  bool allow_unhealthy = false;
  uint8_t ip_families = 0;  // IPFamilies of WDS
  bool canonical = false;
  bool namespace_visibility = false;

  std::string key() const { return ns + "/" + hostname; }
};

struct StringMatch {
  enum class Kind : uint8_t { kExact, kPrefix, kSuffix, kPresence } kind = Kind::kExact;
  std::string value;
};
struct Cidr {
  IpAddress ip;
  uint8_t length = 32;
};
struct ServiceAccountMatch {
  std::string ns, service_account;
};

// Positive and negative list of one attribute.
template <typename T>
struct Attribute {
  std::vector<T> any_of, none_of;
  bool empty() const { return any_of.empty() && none_of.empty(); }
};

struct PolicyMatch {
  Attribute<StringMatch> namespaces, principals;
  Attribute<Cidr> source_ips, destination_ips;
  Attribute<uint16_t> destination_ports;
  Attribute<ServiceAccountMatch> service_accounts;
  // An element of the message could not be understood. A DENY then matches more (the element is taken as
  // matching), an ALLOW less (the match never matches): fail closed, unlike silently dropping the element.
  bool malformed = false;
};

struct Policy {
  enum class Scope : uint8_t { kGlobal, kNamespace, kWorkload } scope = Scope::kWorkload;
  enum class Action : uint8_t { kAllow, kDeny } action = Action::kAllow;
  std::string name, ns;
  bool dry_run = false;
  // rules ORed, clauses of a rule ANDed, matches of a clause ORed
  std::vector<std::vector<std::vector<PolicyMatch>>> rules;

  std::string key() const { return ns + "/" + name; }
};

}  // namespace ebbtide
