// TLS over memory: OpenSSL's handshake by way of a BIO that reads from the fed span and writes to the
// gathered output, then records of our own.
#include "tls_stream.h"

#include <openssl/bio.h>
#include <openssl/err.h>

#include <algorithm>
#include <cstring>

namespace ebbtide {
namespace {

// AES-GCM's limit is 2^24.5 full records a key (RFC 8446 section 5.5); a new key well before.
constexpr uint64_t kKeyRecords = uint64_t{1} << 22;
// Longest handshake message taken after the handshake (a session ticket, in practice).
constexpr size_t kMaxMessage = 64u << 10;
// Records in a row that carry no application data: new keys, tickets, nothing. Each costs us more than the
// peer.
constexpr unsigned kMaxIdleRecords = 32;

constexpr uint8_t kUnexpectedMessage = 10, kBadRecordMac = 20, kRecordOverflow = 22, kInternalError = 80;
constexpr uint8_t kNewSessionTicket = 4, kKeyUpdate = 24;

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
  *done = 0;
  try {  // no exception may pass through OpenSSL
    static_cast<TlsStream*>(BIO_get_data(bio))->output_.append(reinterpret_cast<const uint8_t*>(data), n);
  } catch (const std::bad_alloc&) {
    return 0;
  }
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
  server_ = server;
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

void TlsStream::restore(uint8_t* buffer) {
  if (!carried_) return;
  auto carried = std::move(carried_);
  std::memcpy(buffer, carried->data(), carried->size());
}

TlsStream::Status TlsStream::handshake() {
  ERR_clear_error();
  int result = SSL_do_handshake(ssl_.get());
  if (result == 1) {
    if (takeOver()) return Status::kDone;
    error_ = "the connection's keys cannot be set up";
    return Status::kFailed;
  }
  if (SSL_get_error(ssl_.get(), result) == SSL_ERROR_WANT_READ) return Status::kWantInput;
  error_ = takeTlsErrors();
  if (error_.empty()) error_ = "unexpected end of the TLS connection";
  return Status::kFailed;
}

// From here on OpenSSL's connection object is not needed. It read whole records only, no byte further, and
// wrote nothing under the new keys (no session tickets), so both sequence numbers are zero.
bool TlsStream::takeOver() {
  const unsigned char* name = nullptr;
  unsigned length = 0;
  SSL_get0_alpn_selected(ssl_.get(), &name, &length);
  h2_ = length == 2 && std::memcmp(name, "h2", 2) == 0;
  const SSL_CIPHER* suite = SSL_get_current_cipher(ssl_.get());
  bool large = SSL_CIPHER_get_id(suite) == TLS1_3_CK_AES_256_GCM_SHA384;
  if (!large && SSL_CIPHER_get_id(suite) != TLS1_3_CK_AES_128_GCM_SHA256) return false;
  const EVP_CIPHER* cipher = large ? EVP_aes_256_gcm() : EVP_aes_128_gcm();
  const EVP_MD* digest = large ? EVP_sha384() : EVP_sha256();
  auto hash_size = static_cast<size_t>(EVP_MD_get_size(digest));
  auto& read = server_ ? peer_.client_traffic : peer_.server_traffic;
  auto& write = server_ ? peer_.server_traffic : peer_.client_traffic;
  bool ok = read.size == hash_size && write.size == hash_size && SSL_has_pending(ssl_.get()) == 0 &&
            read_key_.start(cipher, digest, read, false) && write_key_.start(cipher, digest, write, true);
  for (TrafficSecret* secret : {&read, &write}) OPENSSL_cleanse(secret->bytes.data(), secret->bytes.size());
  ssl_.reset();
  established_ = ok;
  return ok;
}

TlsStream::Status TlsStream::next(uint8_t*& data, size_t& n) {
  for (;;) {
    size_t size = RecordKey::kHeaderBytes;
    if (input_size_ >= size) {
      size_t body = static_cast<size_t>(input_[3]) << 8 | input_[4];
      if (input_[0] != kApplicationData) return fail(kUnexpectedMessage, "a record that is not encrypted");
      if (body > RecordKey::kMaxCiphertext) return fail(kRecordOverflow, "a record that is too long");
      size += body;
    }
    if (input_size_ < size) {
      if (input_size_ > 0) carried_ = std::make_unique<std::vector<uint8_t>>(input_, input_ + input_size_);
      input_size_ = 0;
      return Status::kWantInput;
    }
    uint8_t* record = input_;
    input_ += size;
    input_size_ -= size;
    uint8_t type = 0;
    if (!read_key_.open(record, size, type, n)) return fail(kBadRecordMac, "a record that does not decrypt");
    data = record + RecordKey::kHeaderBytes;
    if (type == kApplicationData && n > 0) {
      idle_records_ = 0;
    } else if (++idle_records_ > kMaxIdleRecords) {
      return fail(kUnexpectedMessage, "too many records without data");
    }
    if (type == kApplicationData) {
      if (messages_) return fail(kUnexpectedMessage, "data within a handshake message");
      if (n > 0) return Status::kDone;
    } else if (type == kHandshake) {
      if (auto status = handshakeMessages(data, n); status != Status::kDone) return status;
    } else if (type == kAlert && n == 2) {
      if (data[1] == 0) return Status::kClosed;
      error_ = std::string("TLS alert ") + SSL_alert_desc_string_long(data[1]);
      return Status::kFailed;
    } else {
      return fail(kUnexpectedMessage, "a record of unknown type");
    }
  }
}

TlsStream::Status TlsStream::handshakeMessages(const uint8_t* data, size_t n) {
  if (n == 0) return fail(kUnexpectedMessage, "an empty handshake record");
  if (!messages_) messages_ = std::make_unique<std::vector<uint8_t>>();
  messages_->insert(messages_->end(), data, data + n);
  if (messages_->size() > kMaxMessage)
    return fail(kUnexpectedMessage, "a handshake message that is too long");
  size_t at = 0;
  while (messages_->size() - at >= 4) {
    const uint8_t* message = messages_->data() + at;
    size_t size = static_cast<size_t>(message[1]) << 16 | static_cast<size_t>(message[2]) << 8 | message[3];
    if (messages_->size() - at < 4 + size) break;
    at += 4 + size;
    if (message[0] == kNewSessionTicket && !server_) continue;  // sessions are not resumed
    // The key changes with the next record: nothing may follow in this one (RFC 8446 section 5.1).
    if (message[0] != kKeyUpdate || size != 1 || message[4] > 1 || at != messages_->size()) {
      return fail(kUnexpectedMessage, "an unexpected handshake message");
    }
    // Answered with the next data, once however often it was asked (RFC 8446 section 4.6.3): a peer that asks
    // and does not read makes nothing pile up here.
    if (message[4] == 1) key_update_asked_ = true;
    if (!read_key_.update()) return fail(kInternalError, "no new key");
  }
  if (at == messages_->size()) {
    messages_.reset();
  } else {
    messages_->erase(messages_->begin(), messages_->begin() + static_cast<ptrdiff_t>(at));
  }
  return Status::kDone;
}

bool TlsStream::answerKeyUpdate() {
  if (!key_update_asked_) return true;
  key_update_asked_ = false;
  return updateWriteKey();
}

bool TlsStream::updateWriteKey() {
  uint8_t message[] = {kKeyUpdate, 0, 0, 1, 0, 0};  // update_not_requested, and room for the content type
  return writeRecords(kHandshake, message, 5) && write_key_.update();
}

bool TlsStream::writeRecords(uint8_t type, uint8_t* data, size_t n) {
  if (type == kApplicationData && write_key_.records() > kKeyRecords && !updateWriteKey()) return false;
  while (n > 0) {
    size_t part = std::min(n, RecordKey::kMaxPlain);
    if (!write_key_.seal(type, data, part, output_.reserve(part + RecordKey::kOverhead))) {
      ERR_clear_error();
      error_ = "encryption failed";
      return false;
    }
    output_.commit(part + RecordKey::kOverhead);
    data += part;
    n -= part;
  }
  return true;
}

void TlsStream::close() {
  if (!established_) return;
  uint8_t alert[] = {1, 0, 0};  // warning, close_notify, and room for the content type
  writeRecords(kAlert, alert, 2);
}

TlsStream::Status TlsStream::fail(uint8_t alert, const char* text) {
  ERR_clear_error();
  error_ = std::string("the peer sent ") + text;
  uint8_t fatal[] = {2, alert, 0};
  writeRecords(kAlert, fatal, 2);
  return Status::kFailed;
}

}  // namespace ebbtide
