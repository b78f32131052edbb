// Fuzzes the TLS 1.3 record layer: input without a key (must be refused), and any plaintext under the right
// key (what an authenticated peer may send): types, lengths, key updates, in pieces of any size.
#include <openssl/evp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tls_records.h"

using namespace ebbtide;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  TrafficSecret secret;
  secret.size = 32;
  std::memset(secret.bytes.data(), 7, secret.size);
  RecordKey write, read;
  if (!write.start(EVP_aes_128_gcm(), EVP_sha256(), secret, true) ||
      !read.start(EVP_aes_128_gcm(), EVP_sha256(), secret, false)) {
    std::abort();
  }
  // Raw: whatever it is, it does not decrypt.
  std::vector<uint8_t> raw(data, data + size);
  uint8_t type = 0;
  size_t n = 0;
  if (read.open(raw.data(), raw.size(), type, n)) std::abort();
  read.start(EVP_aes_128_gcm(), EVP_sha256(), secret, false);
  while (size > 3) {
    uint8_t want = data[0];
    size_t length = (static_cast<size_t>(data[1]) << 8 | data[2]) % (RecordKey::kMaxPlain + 1);
    data += 3;
    size -= 3;
    length = std::min(length, size);
    std::vector<uint8_t> plain(data, data + length), record(length + RecordKey::kOverhead);
    plain.push_back(0xee);
    if (!write.seal(want, plain.data(), length, record.data())) std::abort();
    if (plain.back() != 0xee) std::abort();
    bool ok = read.open(record.data(), record.size(), type, n);
    // A type of zero reads as padding; the byte before then tells, as the RFC has it.
    if (want != 0 && (!ok || type != want || n != length || std::memcmp(record.data() + 5, data, n) != 0))
      std::abort();
    if (ok && n > length) std::abort();
    if (want % 16 == 3 && (!write.update() || !read.update())) std::abort();
    data += length;
    size -= length;
  }
  return 0;
}
