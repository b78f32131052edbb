// Routing, inbound validation and the indexes under them, through State alone.
#include "state.h"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <set>

#include "route_authority.h"
#include "telemetry.h"

namespace ebbtide {
namespace {

using Kind = OutboundRoute::Kind;

IpAddress ip(const char* text) {
  return IpAddress::parse(text).value();
}

Workload pod(const std::string& name, std::vector<IpAddress> addresses, bool hbone = true) {
  Workload w;
  w.uid = "Kubernetes//Pod/ns/" + name;
  w.name = name;
  w.ns = "ns";
  w.service_account = name;
  w.trust_domain = "td";
  w.addresses = std::move(addresses);
  w.protocol = hbone ? TunnelProtocol::kHbone : TunnelProtocol::kNone;
  w.node = "n1";
  return w;
}

Workload member(Workload w, std::vector<PortMapping> ports = {}) {
  w.services = {{"ns/svc", std::move(ports)}};
  return w;
}

Service service() {
  Service s;
  s.name = "svc";
  s.ns = "ns";
  s.hostname = "svc";
  s.vips = {{"", ip("10.96.0.1"), 32}};
  s.ports = {{80, 8080}};
  return s;
}

struct Mesh {
  State state{{"n1", "", ""}};
  Mesh() { put(pod("client", {ip("10.0.0.9")})); }
  bool put(Workload w) {
    StateDelta d;
    d.workloads.push_back(std::move(w));
    return state.apply(std::move(d));
  }
  bool put(Service s) {
    StateDelta d;
    d.services.push_back(std::move(s));
    return state.apply(std::move(d));
  }
  bool remove(const char* key) {
    StateDelta d;
    d.removed_addresses = {key};
    return state.apply(std::move(d));
  }
  OutboundRoute dial(const char* to, uint16_t port, std::vector<std::string> exclude = {}) {
    return state.routeOutbound(
        {state.localWorkload("ns", "client", "client"), {ip(to), port}, std::move(exclude)});
  }
  InboundTarget connect(const char* pod, const char* local_ip, const char* authority,
                        const char* forwarded = "") {
    return state.resolveInbound({state.localWorkload("ns", pod, pod), ip(local_ip), authority, forwarded});
  }
};

TEST(Route, WorkloadUnknownAndLoop) {
  Mesh mesh;
  mesh.put(pod("web", {ip("10.0.0.1"), ip("fd00::1")}));
  mesh.put(pod("plain", {ip("10.0.0.2")}, false));
  auto route = mesh.dial("fd00::1", 80);
  EXPECT_EQ(route.kind, Kind::kHbone);
  EXPECT_EQ(route.next_hop.toString(), "[fd00::1]:15008");
  EXPECT_EQ(route.authority, "[fd00::1]:80");
  EXPECT_EQ(route.expected_identities, std::vector<std::string>{"spiffe://td/ns/ns/sa/web"});
  EXPECT_EQ(mesh.dial("10.0.0.1", 15008).authority, "10.0.0.1:15008");
  for (const char* plain : {"10.0.0.2", "203.0.113.5"}) {
    route = mesh.dial(plain, 81);
    EXPECT_EQ(route.kind, Kind::kPlaintext);
    EXPECT_EQ(route.next_hop.toString(), std::string(plain) + ":81");
  }
  EXPECT_EQ(mesh.dial("127.128.3.4", 15001).reason, Reason::kLoop);
  EXPECT_EQ(mesh.dial("::1", 3000).reason, Reason::kLoop);
  EXPECT_EQ(mesh.state.routeOutbound({nullptr, {ip("10.0.0.1"), 80}, {}}).reason,
            Reason::kUnknownLocalWorkload);
}

TEST(Route, ServiceInAnyOrderOfArrival) {
  for (const bool service_first : {true, false}) {
    Mesh mesh;
    Service s = service();
    s.subject_alt_names = {"spiffe://td/ns/x/sa/y", "not an identity"};
    if (service_first) mesh.put(s);
    mesh.put(member(pod("web", {ip("10.0.0.1")})));
    if (!service_first) {
      EXPECT_EQ(mesh.dial("10.96.0.1", 80).kind, Kind::kPlaintext);  // nobody said yet that it is a service
      mesh.put(s);
    }
    auto route = mesh.dial("10.96.0.1", 80);
    EXPECT_EQ(route.next_hop.toString(), "10.0.0.1:15008");
    EXPECT_EQ(route.authority, "10.0.0.1:8080");
    EXPECT_EQ(route.expected_identities,
              (std::vector<std::string>{"spiffe://td/ns/ns/sa/web", "spiffe://td/ns/x/sa/y"}));
    ASSERT_TRUE(route.destination_service);
    EXPECT_FALSE(route.can_retry);
    mesh.put(s);  // replaced: the endpoints stay
    EXPECT_EQ(mesh.dial("10.96.0.1", 80).kind, Kind::kHbone);
    EXPECT_EQ(mesh.dial("10.96.0.1", 81).reason, Reason::kNoHealthyEndpoint);
    mesh.remove("Kubernetes//Pod/ns/web");
    EXPECT_EQ(mesh.dial("10.96.0.1", 80).reason, Reason::kNoHealthyEndpoint);
    s.lb_mode = LbMode::kPassthrough;
    mesh.put(s);
    EXPECT_EQ(mesh.dial("10.96.0.1", 81).next_hop.toString(), "10.96.0.1:81");
    mesh.remove("ns/svc");
    EXPECT_EQ(mesh.state.counts().services, 0u);
    EXPECT_EQ(mesh.state.counts().workloads, 1u);
  }
}

TEST(Route, EndpointsThatCannotTakeIt) {
  Mesh mesh;
  Service s = service();
  s.ports = {{80, 0}};  // named: the endpoint's own mapping counts
  mesh.put(s);
  mesh.put(member(pod("unmapped", {ip("10.0.0.1")})));
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).reason, Reason::kNoHealthyEndpoint);
  Workload sick = member(pod("sick", {ip("10.0.0.2")}), {{80, 9000}});
  sick.healthy = false;
  mesh.put(sick);
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).reason, Reason::kNoHealthyEndpoint);
  Workload far = member(pod("far", {ip("10.0.0.3")}), {{80, 9000}});
  far.network = "other";
  far.network_gateway = GatewayAddress{GatewayAddress::Address{"other", ip("192.0.2.1")}, 15008};
  mesh.put(far);
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).reason, Reason::kUnsupportedDestination);
  s.allow_unhealthy = true;
  mesh.put(s);
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).authority, "10.0.0.2:9000");
  s.ip_families = 2;
  mesh.put(s);
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).kind, Kind::kRefused);
  mesh.put(member(pod("client", {ip("10.0.0.9"), ip("fd00::9")}), {{80, 7000}}));
  const auto self = mesh.dial("10.96.0.1", 80);  // itself, within its own namespace
  EXPECT_EQ(self.kind, Kind::kPlaintext);
  EXPECT_EQ(self.next_hop.toString(), "[fd00::9]:7000");
}

TEST(Route, LocalityFailoverAndStrict) {
  Mesh mesh;
  Service s = service();
  s.routing_preference = {LbScope::kNetwork, LbScope::kZone, LbScope::kNode};
  s.lb_mode = LbMode::kFailover;
  mesh.put(s);
  Workload zone = member(pod("zone", {ip("10.0.0.1")})), node = member(pod("node", {ip("10.0.0.2")})),
           away = member(pod("away", {ip("10.0.0.3")}));
  zone.node = "n2";
  away.node = "n3";
  away.locality.zone = "elsewhere";
  mesh.put(zone);
  mesh.put(away);
  const auto first = [&](std::vector<std::string> exclude) {
    std::set<std::string> seen;
    for (int i = 0; i < 50; i++) seen.insert(mesh.dial("10.96.0.1", 80, exclude).next_hop.ip.toString());
    return seen;
  };
  EXPECT_EQ(first({}), std::set<std::string>{"10.0.0.1"});
  mesh.put(node);
  EXPECT_EQ(first({}), std::set<std::string>{"10.0.0.2"});
  EXPECT_TRUE(mesh.dial("10.96.0.1", 80).can_retry);
  EXPECT_EQ(first({node.uid}), std::set<std::string>{"10.0.0.1"});
  EXPECT_EQ(first({node.uid, zone.uid}), std::set<std::string>{"10.0.0.3"});
  EXPECT_FALSE(mesh.dial("10.96.0.1", 80, {node.uid, zone.uid}).can_retry);
  s.lb_mode = LbMode::kStrict;
  mesh.put(s);
  EXPECT_EQ(first({}), std::set<std::string>{"10.0.0.2"});
  EXPECT_EQ(mesh.dial("10.96.0.1", 80, {node.uid}).reason, Reason::kNoHealthyEndpoint);
}

TEST(Route, BalancesByLoadAndCapacity) {
  for (const int endpoints : {4, 100}) {  // looking at each, and drawing
    Mesh mesh;
    mesh.put(service());
    for (int i = 0; i < endpoints; i++) {
      mesh.put(member(pod("web" + std::to_string(i), {ip(("10.1.0." + std::to_string(i)).c_str())})));
    }
    std::map<std::string, int> picked;
    for (int i = 0; i < endpoints * 20; i++) {
      const auto route = mesh.dial("10.96.0.1", 80);
      ASSERT_EQ(route.kind, Kind::kHbone);
      route.destination_workload->load->connections++;
      picked[route.next_hop.ip.toString()]++;
    }
    EXPECT_EQ(picked.size(), static_cast<size_t>(endpoints));
    for (const auto& [address, n] : picked) EXPECT_NEAR(n, 20, 8) << address;
  }
  Mesh mesh;
  mesh.put(service());
  Workload none = member(pod("none", {ip("10.1.0.1")})), big = member(pod("big", {ip("10.1.0.2")})),
           small = member(pod("small", {ip("10.1.0.3")}));
  none.capacity = 0;
  big.capacity = 3;
  for (const auto& w : {none, big, small}) mesh.put(w);
  std::map<std::string, int> picked;
  for (int i = 0; i < 400; i++) {
    const auto route = mesh.dial("10.96.0.1", 80);
    route.destination_workload->load->connections++;
    picked[route.destination_workload->name]++;
  }
  EXPECT_EQ(picked["none"], 0);
  EXPECT_NEAR(picked["big"], 300, 10);
  // The load is the endpoint's, not the version's.
  const auto before = mesh.state.workloadByUid(big.uid);
  mesh.put(big);
  EXPECT_EQ(mesh.state.refreshed(before)->load, before->load);
}

TEST(Route, Waypoints) {
  Mesh mesh;
  const GatewayAddress by_name{GatewayAddress::Hostname{"ns", "gate"}, 15008};
  Service gate = service();
  gate.name = gate.hostname = "gate";
  gate.vips.clear();
  gate.ports = {{15008, 15009}};
  gate.subject_alt_names = {"spiffe://td/ns/gate/sa/extra"};
  mesh.put(gate);
  Workload gate_pod = pod("gate", {ip("10.0.0.7")});
  gate_pod.services = {{"ns/gate", {}}};
  mesh.put(gate_pod);
  Service s = service();
  s.waypoint = by_name;
  mesh.put(s);
  Workload web = pod("web", {ip("10.0.0.1")});
  web.waypoint = GatewayAddress{GatewayAddress::Address{"", ip("10.0.0.7")}, 15008};
  mesh.put(web);
  auto route = mesh.dial("10.96.0.1", 80);
  EXPECT_EQ(route.next_hop.toString(), "10.0.0.7:15009");
  EXPECT_EQ(route.authority, "10.96.0.1:80");
  EXPECT_EQ(route.expected_identities,
            (std::vector<std::string>{"spiffe://td/ns/ns/sa/gate", "spiffe://td/ns/gate/sa/extra"}));
  EXPECT_EQ(route.destination_service->hostname, "svc");
  route = mesh.dial("10.0.0.1", 80);
  EXPECT_EQ(route.next_hop.toString(), "10.0.0.7:15008");
  EXPECT_EQ(route.authority, "10.0.0.1:80");
  // From the waypoint itself it goes straight.
  route = mesh.state.routeOutbound({mesh.state.workloadByUid(gate_pod.uid), {ip("10.0.0.1"), 80}, {}});
  EXPECT_EQ(route.next_hop.toString(), "10.0.0.1:15008");
  // A waypoint that cannot be found is not gone around.
  mesh.remove("ns/gate");
  EXPECT_EQ(mesh.dial("10.96.0.1", 80).kind, Kind::kRefused);
  mesh.remove(gate_pod.uid.c_str());
  EXPECT_EQ(mesh.dial("10.0.0.1", 80).kind, Kind::kRefused);
}

TEST(Route, Inbound) {
  Mesh mesh;
  Service s = service();
  mesh.put(s);
  mesh.put(member(pod("web", {ip("10.0.0.1"), ip("fd00::1")}), {{80, 9000}}));
  mesh.put(pod("other", {ip("10.0.0.2")}));
  struct Row {
    const char* authority;
    int status;
    Reason reason;
    uint16_t port;
  };
  const Row rows[] = {
      {"10.0.0.1:81", 200, Reason::kNone, 81},
      {"[::ffff:10.0.0.1]:81", 200, Reason::kNone, 81},
      {"svc:80", 200, Reason::kNone, 9000},
      {"SVC:80", 200, Reason::kNone, 9000},
      {"svc:81", 503, Reason::kNoHealthyEndpoint, 0},
      {"nobody:80", 503, Reason::kAuthorityNotLocal, 0},
      {"10.0.0.2:80", 400, Reason::kAuthorityNotLocal, 0},
      {"10.96.0.1:80", 400, Reason::kAuthorityNotLocal, 0},
      {"127.0.0.1:80", 400, Reason::kAuthorityNotLocal, 0},
      {"[fd00::1]:80", 400, Reason::kAuthorityNotLocal, 0},
      {"10.0.0.1:15001", 503, Reason::kIllegalPort, 0},
      {"10.0.0.1:15006", 503, Reason::kIllegalPort, 0},
      {"10.0.0.1:15008", 503, Reason::kIllegalPort, 0},
      {"10.0.0.1", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:0", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:65536", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:0080", 400, Reason::kBadRequest, 0},
      {"user@10.0.0.1:80", 400, Reason::kBadRequest, 0},
      {"[fe80::1%eth0]:80", 400, Reason::kBadRequest, 0},
      {"::1:80", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:-1", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:+80", 400, Reason::kBadRequest, 0},
      {"10.0.0.1:80 ", 400, Reason::kBadRequest, 0},
      {":80", 400, Reason::kBadRequest, 0},
      {"", 400, Reason::kBadRequest, 0},
      {"fd00::1:80", 400, Reason::kBadRequest, 0},
      {"[10.0.0.1]:80", 400, Reason::kBadRequest, 0},
      {"user@10.0.0.1:80", 400, Reason::kBadRequest, 0},
      {"http://10.0.0.1:80", 400, Reason::kBadRequest, 0},
  };
  for (const Row& row : rows) {
    const auto target = mesh.connect("web", "10.0.0.1", row.authority);
    EXPECT_EQ(target.http_status, row.status) << row.authority;
    EXPECT_STREQ(reasonName(target.reason), reasonName(row.reason)) << row.authority;
    if (row.status == 200) {
      EXPECT_EQ(target.application, (SocketAddress{ip("10.0.0.1"), row.port})) << row.authority;
    }
  }
  EXPECT_EQ(mesh.connect("other", "10.0.0.2", "svc:80").reason, Reason::kAuthorityNotLocal);
  EXPECT_EQ(mesh.connect("missing", "10.0.0.2", "10.0.0.2:80").reason, Reason::kUnknownLocalWorkload);
  EXPECT_EQ(mesh.connect("web", "10.0.0.1", "10.0.0.1:81", "for=\"1.2.3.4:5\";host=svc").service->hostname,
            "svc");
  EXPECT_EQ(mesh.connect("other", "10.0.0.2", "10.0.0.2:80", "host=svc").service, nullptr);
  EXPECT_EQ(forwardedHost("for=a; Host=\"x.y\", host=z"), "x.y");
  EXPECT_EQ(forwardedHost("for=a;by=b;;,="), "");
}

TEST(State, WhenOpenConnectionsMustBeAuthorizedAgain) {
  Mesh mesh;
  Workload web = pod("web", {ip("10.0.0.1")}), far = pod("far", {ip("10.0.0.2")});
  far.node = "n2";
  EXPECT_TRUE(mesh.put(web));
  EXPECT_FALSE(mesh.put(web));
  EXPECT_FALSE(mesh.put(far));
  EXPECT_FALSE(mesh.put(service()));
  web.authorization_policies = {"ns/p"};
  EXPECT_TRUE(mesh.put(web));
  // By the newest list, though the one who asks holds an old version.
  const auto ask = [&](const WorkloadPtr& workload) {
    return mesh.state.authorize({std::nullopt, ip("10.9.9.9"), {ip("10.0.0.1"), 80}, workload}).reason;
  };
  const WorkloadPtr held = mesh.state.localWorkload("ns", "web", "web");
  EXPECT_EQ(ask(held), Reason::kPolicyUnknown);
  StateDelta delta;
  delta.policies.resize(1);
  delta.policies[0].ns = "ns";
  delta.policies[0].name = "p";
  EXPECT_TRUE(mesh.state.apply(delta));
  EXPECT_EQ(ask(held), Reason::kPolicyNoAllow);
  web.authorization_policies.clear();
  EXPECT_TRUE(mesh.put(web));
  EXPECT_EQ(ask(held), Reason::kNone);
  EXPECT_TRUE(mesh.remove(web.uid.c_str()));
  EXPECT_EQ(ask(held), Reason::kUnknownLocalWorkload);
  EXPECT_EQ(ask(nullptr), Reason::kUnknownLocalWorkload);
  StateDelta gone;
  gone.removed_policies = {"ns/p"};
  EXPECT_TRUE(mesh.state.apply(gone));
}

TEST(State, WhoHasAnAddress) {
  Mesh mesh;
  Workload entry = pod("entry", {ip("10.0.0.1")});
  entry.uid = "a/entry";
  mesh.put(entry);
  EXPECT_EQ(mesh.state.workloadByIp(ip("10.0.0.1"))->name, "entry");
  mesh.put(pod("web", {ip("10.0.0.1")}, false));
  EXPECT_EQ(mesh.state.workloadByIp(ip("::ffff:10.0.0.1"))->name, "web");
  Workload host = pod("host", {ip("10.0.0.5")});
  host.host_network = true;
  mesh.put(host);
  EXPECT_EQ(mesh.state.workloadByIp(ip("10.0.0.5")), nullptr);
  EXPECT_EQ(mesh.state.localWorkload("ns", "web", "another"), nullptr);
  mesh.remove("Kubernetes//Pod/ns/web");
  EXPECT_EQ(mesh.state.workloadByIp(ip("10.0.0.1"))->name, "entry");
}

TEST(State, FiftyThousandWorkloads) {
  State state({"n1", "", ""});
  constexpr int kCount = 50'000;
  const auto delta = [] {
    StateDelta d;
    for (int i = 0; i < kCount; i++) {
      const uint8_t raw[4] = {10, static_cast<uint8_t>(i >> 16), static_cast<uint8_t>(i >> 8),
                              static_cast<uint8_t>(i)};
      d.workloads.push_back(member(pod(std::to_string(i), {IpAddress::fromV4(raw)})));
    }
    return d;
  };
  const auto begin = std::chrono::steady_clock::now();
  state.apply(delta());
  state.apply(delta());
  StateDelta gone;
  for (int i = 0; i < kCount; i++)
    gone.removed_addresses.push_back("Kubernetes//Pod/ns/" + std::to_string(i));
  state.apply(std::move(gone));
  EXPECT_EQ(state.counts().workloads, 0u);
  // Anything quadratic takes minutes.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

TEST(Telemetry, SeriesByLabelsAndInBounds) {
  TrafficCounters counters;
  TrafficLabels labels;
  labels.source = std::make_shared<const Workload>(pod("a", {}));
  TrafficSeries* series = counters.series(labels);
  EXPECT_EQ(counters.series(labels), series);
  labels.source = std::make_shared<const Workload>(*labels.source);  // a new version with equal labels
  EXPECT_EQ(counters.series(labels), series);
  series->opened = 7;
  std::vector<TrafficSample> samples;
  counters.read(samples);
  ASSERT_EQ(samples.size(), 1u);
  ASSERT_EQ(samples[0].labels.size(), TrafficCounters::labelNames().size());
  EXPECT_EQ(samples[0].labels[0], "source");
  EXPECT_EQ(samples[0].labels[4], "ns");
  EXPECT_EQ(samples[0].labels[9], "unknown");
  EXPECT_EQ(samples[0].opened, 7u);
  for (size_t i = 0; i < TrafficCounters::kMaxSeries + 100; i++) {
    labels.source_principal = std::to_string(i);
    ASSERT_NE(counters.series(labels), nullptr);
  }
  samples.clear();
  counters.read(samples);
  EXPECT_EQ(samples.size(), TrafficCounters::kMaxSeries + 1);
}

TEST(Model, IdentitiesAndAddresses) {
  EXPECT_EQ(Identity::parse("spiffe://td/ns/a/sa/b")->uri(), "spiffe://td/ns/a/sa/b");
  for (const char* bad : {"", "spiffe://", "td/ns/a/sa/b", "spiffe://td/ns/a/sa/b/", "spiffe://td/ns/a/sa",
                          "spiffe:///ns/a/sa/b", "spiffe://td/ns//sa/b", "spiffe://td/ns/a/sa/",
                          "spiffe://td/xx/a/sa/b", "SPIFFE://td/ns/a/sa/b", "spiffe://td/ns/a/sa/b/c"}) {
    EXPECT_FALSE(Identity::parse(bad)) << bad;
  }
  EXPECT_FALSE(Identity::parse(std::string("spiffe://td/ns/a/sa/b\0c", 23)));
  EXPECT_EQ(ip("::ffff:10.0.0.1"), ip("10.0.0.1"));
  EXPECT_FALSE(IpAddress::parse("10.0.0.1 "));
  EXPECT_FALSE(IpAddress::parse("fe80::1%eth0"));
}

}  // namespace
}  // namespace ebbtide
