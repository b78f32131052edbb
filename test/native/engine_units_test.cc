// Small parts of the engine by themselves: queues, timers, header fields.
#include <gtest/gtest.h>

#include <string>

#include "bytes.h"
#include "connect_headers.h"
#include "list.h"
#include "loop.h"

namespace ebbtide::test {
namespace {

TEST(ByteQueue, KeepsOrderAcrossChunksAndGivesMemoryBack) {
  BufferBudget budget(1u << 20);
  ByteQueue queue(budget);
  std::string in, out;
  for (int i = 0; i < 3000; i++) {
    std::string part(static_cast<size_t>(i % 97), static_cast<char>('a' + i % 26));
    in += part;
    queue.append(part.data(), part.size());
    if (i % 3 != 0) continue;
    iovec vectors[2];
    int count = queue.peek(vectors, 2);
    size_t taken = 0;
    for (int v = 0; v < count; v++) {
      size_t n = v == 0 ? vectors[v].iov_len : vectors[v].iov_len / 2;
      out.append(static_cast<char*>(vectors[v].iov_base), n);
      taken += n;
      if (v == 0 && i % 2 == 0) break;
    }
    queue.consume(taken);
  }
  while (!queue.empty()) {
    iovec vector;
    queue.peek(&vector, 1);
    out.append(static_cast<char*>(vector.iov_base), vector.iov_len);
    queue.consume(vector.iov_len);
  }
  EXPECT_EQ(in, out);
  EXPECT_EQ(budget.used(), 0u);
}

TEST(Loop, TimersFireInOrderAndCancel) {
  Loop loop;
  std::string order;
  Timer a([&] { order += 'a'; }), b([&] { order += 'b'; }), c([&] { order += 'c'; });
  loop.arm(a, 20'000);
  loop.arm(b, 1'000);
  loop.arm(c, 5'000);
  loop.arm(a, 10'000);
  c.cancel();
  while (a.armed()) loop.turn(100);
  EXPECT_EQ(order, "ba");
}

TEST(Loop, MessagesAfterClosingAreRefused) {
  Loop loop;
  bool ran = false;
  EXPECT_TRUE(loop.post([&] { ran = true; }));
  loop.turn(100);
  EXPECT_TRUE(ran);
  loop.closeMailbox();
  EXPECT_FALSE(loop.post([] {}));
}

TEST(ConnectHeaders, ReadsOnlyWholeAddresses) {
  EXPECT_EQ(parseSocketAddress("10.0.0.1:80")->toString(), "10.0.0.1:80");
  EXPECT_EQ(parseSocketAddress("[2001:db8::1]:443")->toString(), "[2001:db8::1]:443");
  for (auto bad : {"", ":", "10.0.0.1", "10.0.0.1:", ":80", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:8x",
                   "host:80", "10.0.0.1:-1", "10.0.0.256:1", "[::1:80", "[]:80"}) {
    EXPECT_FALSE(parseSocketAddress(bad)) << bad;
  }
}

TEST(ConnectHeaders, ReadsForwarded) {
  EXPECT_EQ(forwardedFor("for=\"10.0.0.1:80\";host=a.b")->toString(), "10.0.0.1:80");
  EXPECT_EQ(forwardedFor("for=\"[2001:db8::1]:1234\"")->toString(), "[2001:db8::1]:1234");
  for (auto bad : {"", "for=", "for=\"", "for=\"x\"", "for=10.0.0.1:80", "host=a", "for=\"10.0.0.1:80"}) {
    EXPECT_FALSE(forwardedFor(bad)) << bad;
  }
  SocketAddress v6{*IpAddress::parse("2001:db8::1"), 9};
  EXPECT_EQ(forwardedOf(v6, nullptr), "for=\"[2001:db8::1]:9\"");
}

TEST(ConnectHeaders, TraceIds) {
  uint8_t random[24] = {0xab, 1};
  std::string field = traceparentOf(random);
  EXPECT_EQ(field.size(), 55u);
  EXPECT_EQ(traceIdOf(field), "ab010000000000000000000000000000");
  EXPECT_EQ(traceIdOf(field + "0"), "");
  field[10] = 'X';
  EXPECT_EQ(traceIdOf(field), "");
}

TEST(ConnectHeaders, ProxyProtocolVersion2) {
  SocketAddress a{*IpAddress::parse("10.0.0.1"), 0x1234}, b{*IpAddress::parse("10.0.0.2"), 80};
  std::string expected(
      "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x12\x0a\0\0\x01\x0a\0\0\x02\x12\x34\0\x50\xd0\0\x03"
      "abc",
      34);
  EXPECT_EQ(proxyHeader(a, b, "abc"), expected);
  SocketAddress six{*IpAddress::parse("2001:db8::1"), 1};
  EXPECT_EQ(proxyHeader(six, b, "").size(), 16u + 36u);
}

}  // namespace
}  // namespace ebbtide::test
