// One TLS 1.3 connection over memory. OpenSSL does the handshake and is then let go; records of application
// data are encrypted from the caller's buffer into the gathered output and decrypted where they were
// received. No socket, and no buffer while idle.
#pragma once

#include <openssl/ssl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "output.h"
#include "tls_context.h"
#include "tls_records.h"

namespace ebbtide {

class TlsStream {
 public:
  enum class Status { kDone, kWantInput, kClosed, kFailed };

  explicit TlsStream(BlockPool& pool) : output_(pool) {}
  TlsStream(const TlsStream&) = delete;
  TlsStream& operator=(const TlsStream&) = delete;

  // Keeps the context alive. False when out of memory.
  bool begin(std::shared_ptr<const TlsContext> context, bool server);

  // ---- input: receive behind room for carried(), restore() into it, feed() both, then handshake() or next()
  // until they want more The incomplete record of the last feed(), of carried() bytes, to the start of
  // `buffer` (which holds a record at least).
  void restore(uint8_t* buffer);
  size_t carried() const { return carried_ ? carried_->size() : 0; }
  // `data` is decrypted in place, stays until the next restore().
  void feed(uint8_t* data, size_t n) {
    input_ = data;
    input_size_ = n;
  }
  Status handshake();
  bool begun() const { return ssl_ != nullptr || established_; }
  bool established() const { return established_; }
  bool negotiatedH2() const { return h2_; }
  // The next run of application data; kDone: `data` and `n` are set, n > 0.
  Status next(uint8_t*& data, size_t& n);

  // ---- output
  // Encrypts all of it; data[n] must be writable too. False: the connection is unusable.
  bool write(uint8_t* data, size_t n) { return answerKeyUpdate() && writeRecords(kApplicationData, data, n); }
  void close();  // close_notify, best effort
  Output& output() { return output_; }
  const Output& output() const { return output_; }

  PeerCheck& peer() { return peer_; }
  const std::string& error() const { return error_; }

 private:
  static constexpr uint8_t kAlert = 21, kHandshake = 22, kApplicationData = 23;
  struct Free {
    void operator()(SSL* ssl) const { SSL_free(ssl); }
  };
  static BIO_METHOD* bioMethod();
  static int bioRead(BIO* bio, char* out, size_t n, size_t* done);
  static int bioWrite(BIO* bio, const char* data, size_t n, size_t* done);
  static long bioControl(BIO* bio, int command, long number, void* pointer);
  bool takeOver();
  bool writeRecords(uint8_t type, uint8_t* data, size_t n);
  Status handshakeMessages(const uint8_t* data, size_t n);
  bool answerKeyUpdate();
  bool updateWriteKey();
  Status fail(uint8_t alert, const char* text);

  Output output_;
  PeerCheck peer_;
  std::shared_ptr<const TlsContext> context_;
  std::unique_ptr<SSL, Free> ssl_;  // during the handshake only
  RecordKey read_key_, write_key_;
  uint8_t* input_ = nullptr;
  size_t input_size_ = 0;
  std::unique_ptr<std::vector<uint8_t>> carried_;   // an incomplete record
  std::unique_ptr<std::vector<uint8_t>> messages_;  // an incomplete handshake message
  bool established_ = false, server_ = false, h2_ = false;
  bool key_update_asked_ = false;  // by the peer, and not answered yet
  unsigned idle_records_ = 0;      // received in a row without application data
  std::string error_;
};

}  // namespace ebbtide
