// TLS over memory, by way of a BIO that reads from the fed span and writes to the gathered output.
#include "tls_stream.h"

#include <openssl/bio.h>
#include <openssl/err.h>

#include <algorithm>
#include <cstring>

namespace ebbtide {
namespace {

// AES-GCM's limit is 2^24.5 full records a key (RFC 8446 section 5.5); a new key well before.
constexpr uint64_t kKeyBytes = uint64_t{64} << 30;

}  // namespace

int TlsStream::bioRead(BIO* bio, char* out, size_t n, size_t* done) {
  auto* stream = static_cast<TlsStream*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  if (stream->input_size_ == 0) {
    BIO_set_retry_read(bio);
    *done = 0;
    return 0;
  }
  *done = std::min(n, stream->input_size_);
  std::memcpy(out, stream->input_, *done);
  stream->input_ += *done;
  stream->input_size_ -= *done;
  return 1;
}

int TlsStream::bioWrite(BIO* bio, const char* data, size_t n, size_t* done) {
  BIO_clear_retry_flags(bio);
  static_cast<TlsStream*>(BIO_get_data(bio))->output_.append(reinterpret_cast<const uint8_t*>(data), n);
  *done = n;
  return 1;
}

long TlsStream::bioControl(BIO*, int command, long, void*) {
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

BIO_METHOD* TlsStream::bioMethod() {
  // Lives as long as the process: connections of any thread may still hold it at exit.
  static BIO_METHOD* const method = [] {
    BIO_METHOD* created = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "mesh tunnel");
    BIO_meth_set_read_ex(created, bioRead);
    BIO_meth_set_write_ex(created, bioWrite);
    BIO_meth_set_ctrl(created, bioControl);
    return created;
  }();
  return method;
}

bool TlsStream::begin(std::shared_ptr<const TlsContext> context, bool server) {
  context_ = std::move(context);
  peer_.server = server;
  peer_.trust_domain = context_->identity().trust_domain;
  ssl_.reset(context_->create(peer_));
  if (!ssl_) return false;
  BIO* bio = BIO_new(bioMethod());
  if (bio == nullptr) return false;
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_.get(), bio, bio);
  if (server) {
    SSL_set_accept_state(ssl_.get());
  } else {
    SSL_set_connect_state(ssl_.get());
  }
  return true;
}

TlsStream::Status TlsStream::handshake() {
  ERR_clear_error();
  int result = SSL_do_handshake(ssl_.get());
  if (result != 1) return fail(result);
  established_ = true;
  return Status::kDone;
}

bool TlsStream::negotiatedH2() const {
  const unsigned char* name = nullptr;
  unsigned length = 0;
  SSL_get0_alpn_selected(ssl_.get(), &name, &length);
  return length == 2 && std::memcmp(name, "h2", 2) == 0;
}

TlsStream::Status TlsStream::read(uint8_t* out, size_t capacity, size_t& size) {
  ERR_clear_error();
  int result = SSL_read_ex(ssl_.get(), out, capacity, &size);
  return result == 1 ? Status::kDone : fail(result);
}

bool TlsStream::write(const uint8_t* data, size_t n) {
  ERR_clear_error();
  size_t written = 0;
  int result = SSL_write_ex(ssl_.get(), data, n, &written);
  if (result != 1 || written != n) {
    fail(result);
    return false;
  }
  sent_with_key_ += n;
  if (sent_with_key_ > kKeyBytes) {
    sent_with_key_ = 0;
    SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_NOT_REQUESTED);
  }
  return true;
}

void TlsStream::close() {
  if (!established_) return;
  ERR_clear_error();
  SSL_shutdown(ssl_.get());
  ERR_clear_error();
}

TlsStream::Status TlsStream::fail(int result) {
  switch (SSL_get_error(ssl_.get(), result)) {
    case SSL_ERROR_WANT_READ:
      return Status::kWantInput;
    case SSL_ERROR_ZERO_RETURN:
      return Status::kClosed;
    default:
      error_ = takeTlsErrors();
      if (error_.empty()) error_ = "unexpected end of the TLS connection";
      return Status::kFailed;
  }
}

}  // namespace ebbtide
