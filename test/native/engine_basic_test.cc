// The way of one connection: captured, tunnelled, allowed, delivered, recorded.
#include <gtest/gtest.h>

#include <cerrno>

#include "lab.h"

namespace ebbtide::test {
namespace {

TEST(EngineBasic, EchoThroughTheTunnelShowsTheClientAndIsRecorded) {
  Lab lab;
  lab.allowOnlyMesh();
  Tcp listener = listenOn(lab.server, 8080);
  Tcp connection = connectTo(lab.client, Lab::kServerIp, 8080);
  ASSERT_TRUE(connection) << strerror(errno);
  Tcp accepted = acceptFrom(listener);
  ASSERT_TRUE(accepted) << strerror(errno);
  EXPECT_EQ(peerOf(accepted).ip.toString(), Lab::kClientIp);
  ASSERT_TRUE(connection.send("hello"));
  EXPECT_EQ(accepted.receive(5), "hello");
  ASSERT_TRUE(accepted.send("welcome"));
  EXPECT_EQ(connection.receive(7), "welcome");
  EXPECT_EQ(lab.one->connections().size(), 1u);
  connection.finish();
  EXPECT_EQ(accepted.receive(1), "");
  EXPECT_EQ(errno, 0);
  accepted.close();
  EXPECT_EQ(connection.receive(1), "");
  auto out = lab.one_events.wait([](const AccessRecord& record) { return !record.inbound; });
  ASSERT_TRUE(out);
  EXPECT_TRUE(out->established);
  EXPECT_EQ(out->reason, Reason::kNone) << out->detail;
  EXPECT_EQ(out->bytes_sent, 5u);
  EXPECT_EQ(out->bytes_received, 7u);
  EXPECT_EQ(out->source_identity, Lab::kClientUri);
  EXPECT_EQ(out->destination_identity, Lab::kServerUri);
  auto in = lab.two_events.wait([](const AccessRecord& record) { return record.inbound; });
  ASSERT_TRUE(in);
  EXPECT_EQ(in->reason, Reason::kNone) << in->detail;
  EXPECT_EQ(in->source_identity, Lab::kClientUri);
  EXPECT_EQ(in->bytes_sent, 7u);
  EXPECT_EQ(in->bytes_received, 5u);
  EXPECT_EQ(in->hbone_address, "10.77.0.2:8080");
  EXPECT_EQ(in->trace_id, out->trace_id);
  EXPECT_EQ(lab.one->stats().open_connections, 0u);
  EXPECT_EQ(lab.one->stats().hbone_connections, 1u);
  EXPECT_EQ(lab.two->stats().buffered_bytes, 0u);
}

}  // namespace
}  // namespace ebbtide::test
