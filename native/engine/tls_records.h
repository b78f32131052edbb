// TLS 1.3 record protection (RFC 8446 section 5) after the handshake: encrypts from the caller's buffer
// straight into the output, decrypts in place. The handshake itself is OpenSSL's; this only continues with
// its traffic secrets.
#pragma once

#include <openssl/evp.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace ebbtide {

// A traffic secret of up to SHA-384's length.
struct TrafficSecret {
  ~TrafficSecret();
  std::array<uint8_t, 48> bytes{};
  size_t size = 0;
};

// One direction's key.
class RecordKey {
 public:
  static constexpr size_t kHeaderBytes = 5, kTagBytes = 16;
  static constexpr size_t kMaxPlain = 16'384;
  static constexpr size_t kOverhead = kHeaderBytes + 1 + kTagBytes;
  static constexpr size_t kMaxCiphertext = kMaxPlain + 256;

  RecordKey() = default;
  ~RecordKey();
  RecordKey(const RecordKey&) = delete;
  RecordKey& operator=(const RecordKey&) = delete;

  // `cipher` is AES-128-GCM (with SHA-256) or AES-256-GCM (with SHA-384). False: OpenSSL failed.
  bool start(const EVP_CIPHER* cipher, const EVP_MD* digest, const TrafficSecret& secret, bool encrypt);
  // The next generation of the secret (KeyUpdate).
  bool update();

  // Writes n + kOverhead bytes to `out`. data[n] must be writable; it is restored. n <= kMaxPlain.
  bool seal(uint8_t type, uint8_t* data, size_t n, uint8_t* out);
  // `record` is header and ciphertext, `size` bytes in all. The plaintext is left at record + kHeaderBytes.
  bool open(uint8_t* record, size_t size, uint8_t& type, size_t& n);
  uint64_t records() const { return sequence_; }

 private:
  struct Free {
    void operator()(EVP_CIPHER_CTX* context) const { EVP_CIPHER_CTX_free(context); }
  };
  bool derive();
  void nonce(uint8_t* out);

  const EVP_CIPHER* cipher_ = nullptr;
  const EVP_MD* digest_ = nullptr;
  TrafficSecret secret_;
  std::unique_ptr<EVP_CIPHER_CTX, Free> context_;
  std::array<uint8_t, 12> iv_{};
  uint64_t sequence_ = 0;
  bool encrypt_ = false;
};

}  // namespace ebbtide
