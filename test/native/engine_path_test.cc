// Whole paths that the usual pods do not take: IPv6, a PROXY header, several workers, a second endpoint.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "lab.h"

namespace ebbtide::test {
namespace {

constexpr const char* kClient6 = "fd77::1";
constexpr const char* kServer6 = "fd77::2";

// The lab's redirect rules speak of IPv4; these are the same for IPv6.
constexpr const char* kRules6 = R"(
ip -6 rule add fwmark 0x111/0xfff lookup 100 pref 32764
ip -6 route add local default dev lo table 100
nft -f - <<'END'
table ip6 mesh6 {
  chain nat_in { type nat hook prerouting priority dstnat;
    meta l4proto tcp ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006; }
  chain nat_out { type nat hook output priority -100;
    meta l4proto tcp ct mark & 0xfff == 0x111 accept
    meta l4proto tcp oifname "lo" ip6 daddr != ::1 accept
    meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15001; }
}
END
)";

// Outbound capture only, and a default route into the void.
constexpr const char* kNowhere = R"(
ip link set lo up
ip link add void0 type veth peer name void1
ip addr add 10.88.0.1/24 dev void0
ip link set void0 up; ip link set void1 up
ip route add default dev void0
nft -f - <<'END'
table inet mesh {
  chain nat_out { type nat hook output priority -100;
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001; }
}
END
)";

Tcp connectTo6(const Netns& from, const char* ip, uint16_t port) {
  int fd = -1;
  from.within([&] {
    fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    timeval limit{20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    sockaddr_in6 to{};
    to.sin6_family = AF_INET6;
    to.sin6_port = htons(port);
    inet_pton(AF_INET6, ip, &to.sin6_addr);
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) {
      close(fd);
      fd = -1;
    }
  });
  return Tcp(fd);
}

Tcp listenOn6(const Netns& in, uint16_t port) {
  int fd = -1;
  in.within([&] {
    fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    timeval limit{20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    sockaddr_in6 any{};
    any.sin6_family = AF_INET6;
    any.sin6_port = htons(port);
    if (bind(fd, reinterpret_cast<sockaddr*>(&any), sizeof any) != 0) fd = -1;
    if (fd >= 0) listen(fd, 64);
  });
  return Tcp(fd);
}

TEST(EnginePath, Ipv6FromEndToEnd) {
  Lab lab;
  lab.client.run(std::string(kRules6) + "ip addr add fd77::1/64 dev mesh0 nodad");
  lab.server.run(std::string(kRules6) + "ip addr add fd77::2/64 dev mesh1 nodad");
  StateDelta delta;
  delta.workloads = {lab.workload("client", kClient6, "one"), lab.workload("server", kServer6, "two")};
  lab.apply(delta);
  Tcp listener = listenOn6(lab.server, 8080);
  Tcp near = connectTo6(lab.client, kServer6, 8080);
  ASSERT_TRUE(near);
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(far);
  EXPECT_EQ(peerOf(far).ip.toString(), kClient6);
  ASSERT_TRUE(near.send("six"));
  EXPECT_EQ(far.receive(3), "six");
  near.close();
  far.close();
  auto record = lab.two_events.wait([](const AccessRecord& each) { return each.inbound; });
  ASSERT_TRUE(record);
  EXPECT_EQ(record->source.ip.toString(), kClient6);
  EXPECT_EQ(record->hbone_address, "[fd77::2]:8080");
  EXPECT_EQ(record->source_identity, Lab::kClientUri);
}

TEST(EnginePath, AProxyHeaderComesFirst) {
  Lab lab;
  StateDelta delta;
  Workload server = lab.workload("server", Lab::kServerIp, "two");
  server.has_application_tunnel = server.application_tunnel_proxy = true;
  server.application_tunnel_port = 9090;
  delta.workloads = {server};
  lab.apply(delta);
  Tcp listener = listenOn(lab.server, 9090);
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(near.send("first bytes"));
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(far);
  EXPECT_TRUE(peerOf(far).ip.isLoopback());
  std::string identity = Lab::kClientUri;
  std::string header = far.receive(16 + 12 + 3 + identity.size());
  ASSERT_EQ(header.substr(0, 14), std::string("\r\n\r\n\0\r\nQUIT\n\x21\x11", 14));
  EXPECT_EQ(header.substr(16, 8), std::string("\x0a\x4d\0\x01\x0a\x4d\0\x02", 8));
  EXPECT_EQ(header.substr(26, 2), std::string("\x1f\x90", 2));  // the port that was dialled: 8080
  EXPECT_EQ(header.substr(31), identity);
  EXPECT_EQ(far.receive(11), "first bytes");
}

TEST(EnginePath, SeveralWorkersShareAPod) {
  Lab lab([](EngineConfig& config) { config.workers = 4; });
  Tcp listener = listenOn(lab.server, 8080);
  std::vector<Tcp> near, far;
  for (int i = 0; i < 60; i++) {
    near.push_back(connectTo(lab.client, Lab::kServerIp, 8080));
    far.push_back(acceptFrom(listener));
    ASSERT_TRUE(near.back() && far.back());
    std::string text = std::to_string(i);
    ASSERT_TRUE(near.back().send(text));
    ASSERT_EQ(far.back().receive(text.size()), text);
  }
  EXPECT_EQ(lab.one->stats().open_connections, 60u);
  EXPECT_GT(lab.one->stats().hbone_connections, 1u) << "all connections went to one worker";
  EXPECT_EQ(lab.one->connections().size(), 60u);
  lab.two->removePod("server-uid");
  for (auto& each : near) EXPECT_TRUE(each.isReset());
  EXPECT_EQ(lab.two->stats().open_connections, 0u);
}

TEST(EnginePath, AnEndpointThatRefusesIsPassedOver) {
  Lab lab;
  StateDelta delta;
  Workload server = lab.workload("server", Lab::kServerIp, "two");
  server.services = {{"default/shop.default.svc.cluster.local", {{80, 8080}}}};
  // In the same namespace and without a listener: its HBONE port refuses.
  Workload gone = lab.workload("gone", "10.77.0.66", "two");
  gone.services = server.services;
  lab.client.run("ip route add unreachable 10.77.0.66/32");
  Service shop;
  shop.name = "shop";
  shop.ns = "default";
  shop.hostname = "shop.default.svc.cluster.local";
  shop.vips = {{"", *IpAddress::parse("10.99.0.1"), 32}};
  shop.ports = {{80, 8080}};
  delta.workloads = {server, gone};
  delta.services = {shop};
  lab.apply(delta);
  lab.client.run("ip route add 10.99.0.0/16 dev mesh0");
  Tcp listener = listenOn(lab.server, 8080);
  for (int i = 0; i < 12; i++) {
    Tcp near = connectTo(lab.client, "10.99.0.1", 80);
    Tcp far = acceptFrom(listener);
    ASSERT_TRUE(near && far) << i;
    ASSERT_TRUE(near.send("a"));
    ASSERT_EQ(far.receive(1), "a");
  }
}

// The far proxy is there and says 503: nothing of the client has left, another endpoint gets it all.
TEST(EnginePath, AnEndpointWhoseApplicationIsDeadIsPassedOver) {
  Lab lab;
  const std::string key = "default/shop.default.svc.cluster.local";
  Workload server = lab.workload("server", Lab::kServerIp, "two");
  server.services = {{key, {{80, 8080}}}};
  // The same pod by another port, on which nobody listens.
  Workload dead = server;
  dead.uid = "dead-uid";
  dead.name = "dead";
  dead.addresses = server.addresses;
  dead.services = {{key, {{80, 8081}}}};
  Service shop;
  shop.name = "shop";
  shop.ns = "default";
  shop.hostname = "shop.default.svc.cluster.local";
  shop.vips = {{"", *IpAddress::parse("10.99.0.1"), 32}};
  shop.ports = {{80, 8080}};
  StateDelta delta;
  delta.workloads = {dead, server};
  delta.services = {shop};
  lab.apply(delta);
  lab.client.run("ip route add 10.99.0.0/16 dev mesh0");
  Tcp listener = listenOn(lab.server, 8080);
  for (int i = 0; i < 16; i++) {
    Tcp near = connectTo(lab.client, "10.99.0.1", 80);
    ASSERT_TRUE(near.send("early"));
    Tcp far = acceptFrom(listener);
    ASSERT_TRUE(far) << i;
    ASSERT_EQ(far.receive(5), "early");
    ASSERT_TRUE(far.send("late"));
    ASSERT_EQ(near.receive(4), "late");
  }
  auto refused = lab.two_events.wait([](const AccessRecord& each) { return !each.established; });
  ASSERT_TRUE(refused) << "the dead one was never tried";
  EXPECT_EQ(refused->reason, Reason::kConnectRefused);
  // The client's side has nothing to complain of.
  EXPECT_FALSE(lab.one_events.wait([](const AccessRecord& each) { return !each.established; }, 1));
}

// One worker dials for many pods: never from the namespace of another, also when pods come and go.
TEST(EnginePath, PodsThatComeAndGoDialFromTheirOwnNamespace) {
  Lab lab;
  Tcp listener = listenOn(lab.server, 8080);
  for (int round = 0; round < 15; round++) {
    // The same pod in a namespace that leads nowhere: what it dials may arrive nowhere.
    auto nowhere = std::make_unique<Netns>();
    nowhere->run(kNowhere);
    std::string mark(1, static_cast<char>('a' + round));
    Tcp before = connectTo(lab.client, Lab::kServerIp, 8080);
    ASSERT_TRUE(before.send(mark));
    Tcp reached = acceptFrom(listener);
    ASSERT_EQ(reached.receive(1), mark);
    lab.one->addPod({"client-uid", "client", "default", "client", nowhere->duplicate()});
    lab.one->connections();
    EXPECT_TRUE(before.isReset());
    Tcp lost = connectTo(*nowhere, Lab::kServerIp, 8080);
    ASSERT_TRUE(lost.send("wrong"));
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    lab.one->addPod({"client-uid", "client", "default", "client", lab.client.duplicate()});
  }
  Tcp near = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(near.send("z"));
  Tcp far = acceptFrom(listener);
  ASSERT_TRUE(far);
  EXPECT_EQ(far.receive(1), "z");
  EXPECT_EQ(peerOf(far).ip.toString(), Lab::kClientIp);
}

}  // namespace
}  // namespace ebbtide::test
