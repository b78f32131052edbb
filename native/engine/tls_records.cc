// TLS 1.3 record protection.
#include "tls_records.h"

#include <openssl/crypto.h>
#include <openssl/hmac.h>

#include <cstring>
#include <string_view>

namespace ebbtide {
namespace {

// HKDF-Expand-Label with an empty context (RFC 8446 section 7.1); every length asked for fits one block.
bool expandLabel(const EVP_MD* digest, const TrafficSecret& secret, std::string_view label, uint8_t* out,
                 size_t n) {
  uint8_t info[64];
  size_t size = 0;
  info[size++] = 0;
  info[size++] = static_cast<uint8_t>(n);
  info[size++] = static_cast<uint8_t>(6 + label.size());
  std::memcpy(info + size, "tls13 ", 6);
  size += 6;
  std::memcpy(info + size, label.data(), label.size());
  size += label.size();
  info[size++] = 0;
  info[size++] = 1;  // HKDF's block counter
  uint8_t block[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  bool ok = HMAC(digest, secret.bytes.data(), static_cast<int>(secret.size), info, size, block, &length) !=
                nullptr &&
            length >= n;
  if (ok) std::memcpy(out, block, n);
  OPENSSL_cleanse(block, sizeof block);
  return ok;
}

}  // namespace

TrafficSecret::~TrafficSecret() {
  OPENSSL_cleanse(bytes.data(), bytes.size());
}

RecordKey::~RecordKey() {
  OPENSSL_cleanse(iv_.data(), iv_.size());
}

bool RecordKey::start(const EVP_CIPHER* cipher, const EVP_MD* digest, const TrafficSecret& secret,
                      bool encrypt) {
  cipher_ = cipher;
  digest_ = digest;
  secret_.bytes = secret.bytes;
  secret_.size = secret.size;
  encrypt_ = encrypt;
  context_.reset(EVP_CIPHER_CTX_new());
  return context_ != nullptr && derive();
}

bool RecordKey::derive() {
  uint8_t key[32];
  auto key_size = static_cast<size_t>(EVP_CIPHER_get_key_length(cipher_));
  bool ok = key_size <= sizeof key && expandLabel(digest_, secret_, "key", key, key_size) &&
            expandLabel(digest_, secret_, "iv", iv_.data(), iv_.size()) &&
            EVP_CipherInit_ex(context_.get(), cipher_, nullptr, key, nullptr, encrypt_ ? 1 : 0) == 1;
  OPENSSL_cleanse(key, sizeof key);
  sequence_ = 0;
  return ok;
}

bool RecordKey::update() {
  TrafficSecret next;
  next.size = secret_.size;
  if (!expandLabel(digest_, secret_, "traffic upd", next.bytes.data(), next.size)) return false;
  secret_.bytes = next.bytes;
  return derive();
}

void RecordKey::nonce(uint8_t* out) {
  std::memcpy(out, iv_.data(), iv_.size());
  for (size_t i = 0; i < 8; i++) out[11 - i] ^= static_cast<uint8_t>(sequence_ >> (8 * i));
  sequence_++;
}

bool RecordKey::seal(uint8_t type, uint8_t* data, size_t n, uint8_t* out) {
  size_t body = n + 1 + kTagBytes;
  out[0] = 23;
  out[1] = out[2] = 3;
  out[3] = static_cast<uint8_t>(body >> 8);
  out[4] = static_cast<uint8_t>(body);
  uint8_t iv[12];
  nonce(iv);
  // Plaintext and content type must be one run of bytes for the cipher to stay on its fast path.
  uint8_t saved = data[n];
  data[n] = type;
  EVP_CIPHER_CTX* context = context_.get();
  int length = 0, rest = 0;
  bool ok = EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, iv, -1) == 1 &&
            EVP_CipherUpdate(context, nullptr, &length, out, kHeaderBytes) == 1 &&
            EVP_CipherUpdate(context, out + kHeaderBytes, &length, data, static_cast<int>(n + 1)) == 1 &&
            EVP_CipherFinal_ex(context, out + kHeaderBytes + length, &rest) == 1 &&
            EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, kTagBytes, out + kHeaderBytes + n + 1) == 1;
  data[n] = saved;
  return ok;
}

bool RecordKey::open(uint8_t* record, size_t size, uint8_t& type, size_t& n) {
  if (size < kHeaderBytes + kTagBytes + 1) return false;
  size_t sealed = size - kHeaderBytes - kTagBytes;
  uint8_t* body = record + kHeaderBytes;
  uint8_t iv[12];
  nonce(iv);
  EVP_CIPHER_CTX* context = context_.get();
  int length = 0, rest = 0;
  bool ok = EVP_CipherInit_ex(context, nullptr, nullptr, nullptr, iv, -1) == 1 &&
            EVP_CipherUpdate(context, nullptr, &length, record, kHeaderBytes) == 1 &&
            EVP_CipherUpdate(context, body, &length, body, static_cast<int>(sealed)) == 1 &&
            EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, kTagBytes, body + sealed) == 1 &&
            EVP_CipherFinal_ex(context, body + length, &rest) == 1;
  if (!ok) return false;
  // Padding is zeros after the content type.
  while (sealed > 0 && body[sealed - 1] == 0) sealed--;
  if (sealed == 0) return false;
  type = body[sealed - 1];
  n = sealed - 1;
  return n <= kMaxPlain;
}

}  // namespace ebbtide
