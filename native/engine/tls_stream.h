// One TLS connection over memory: ciphertext is fed in as it came from the socket, ciphertext to be sent is
// gathered in an Output. No socket and no buffers of its own.
#pragma once

#include <openssl/ssl.h>

#include <cstdint>
#include <memory>
#include <string>

#include "output.h"
#include "tls_context.h"

namespace ebbtide {

class TlsStream {
 public:
  enum class Status { kDone, kWantInput, kClosed, kFailed };

  explicit TlsStream(BlockPool& pool) : output_(pool) {}
  TlsStream(const TlsStream&) = delete;
  TlsStream& operator=(const TlsStream&) = delete;

  // Keeps the context alive. False when out of memory.
  bool begin(std::shared_ptr<const TlsContext> context, bool server);

  // `data` must stay until the next feed(); all of it is consumed by handshake() or read() until they want
  // input.
  void feed(const uint8_t* data, size_t n) {
    input_ = data;
    input_size_ = n;
  }
  Status handshake();
  bool established() const { return established_; }
  bool negotiatedH2() const;

  // Decrypts into `out`; `size` is what was read. kDone: at least one byte.
  Status read(uint8_t* out, size_t capacity, size_t& size);
  // Encrypts all of it into the output. False: the connection is unusable.
  bool write(const uint8_t* data, size_t n);
  void close();  // close_notify, best effort

  Output& output() { return output_; }
  const Output& output() const { return output_; }
  PeerCheck& peer() { return peer_; }
  const std::string& error() const { return error_; }

 private:
  struct Free {
    void operator()(SSL* ssl) const { SSL_free(ssl); }
  };
  static BIO_METHOD* bioMethod();
  static int bioRead(BIO* bio, char* out, size_t n, size_t* done);
  static int bioWrite(BIO* bio, const char* data, size_t n, size_t* done);
  static long bioControl(BIO* bio, int command, long number, void* pointer);
  Status fail(int result);

  Output output_;
  PeerCheck peer_;
  std::shared_ptr<const TlsContext> context_;
  std::unique_ptr<SSL, Free> ssl_;
  const uint8_t* input_ = nullptr;
  size_t input_size_ = 0;
  uint64_t sent_with_key_ = 0;
  bool established_ = false;
  std::string error_;
};

}  // namespace ebbtide
