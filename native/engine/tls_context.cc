// SSL_CTX construction and peer verification.
#include "tls_context.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <algorithm>
#include <stdexcept>

#include "engine.h"

namespace ebbtide {
namespace {

template <typename T, void (*F)(T*)>
struct Free {
  void operator()(T* value) const { F(value); }
};
using X509Ptr = std::unique_ptr<X509, Free<X509, X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Free<EVP_PKEY, EVP_PKEY_free>>;
struct BioFree {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
using BioPtr = std::unique_ptr<BIO, BioFree>;
using NamesPtr = std::unique_ptr<GENERAL_NAMES, Free<GENERAL_NAMES, GENERAL_NAMES_free>>;

BioPtr textBio(const std::string& text) {
  return BioPtr(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

std::vector<X509Ptr> certificates(const std::string& pem, const char* what) {
  std::vector<X509Ptr> found;
  BioPtr bio = textBio(pem);
  // Owned before the list grows, which may throw.
  while (X509Ptr certificate{PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)})
    found.push_back(std::move(certificate));
  unsigned long last = ERR_peek_last_error();
  bool at_end = ERR_GET_LIB(last) == ERR_LIB_PEM && ERR_GET_REASON(last) == PEM_R_NO_START_LINE;
  std::string errors = takeTlsErrors();
  if (found.empty() || !at_end)
    throw std::runtime_error(std::string("cannot read the ") + what + ": " + errors);
  return found;
}

// SPIFFE URIs of the certificate, in order.
std::vector<Identity> spiffeIdentities(X509* certificate) {
  std::vector<Identity> found;
  NamesPtr names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr)));
  for (int i = 0; i < sk_GENERAL_NAME_num(names.get()); i++) {  // of none: -1
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type != GEN_URI) continue;
    const ASN1_IA5STRING* uri = name->d.uniformResourceIdentifier;
    std::string text(reinterpret_cast<const char*>(ASN1_STRING_get0_data(uri)),
                     static_cast<size_t>(ASN1_STRING_length(uri)));
    if (auto identity = Identity::parse(text)) found.push_back(std::move(*identity));
  }
  return found;
}

bool acceptIdentity(PeerCheck& check, X509* certificate) {
  auto identities = spiffeIdentities(certificate);
  if (identities.empty()) {
    check.failure = check.server ? Reason::kPeerUntrusted : Reason::kPeerIdentityMismatch;
    check.detail = "the peer's certificate holds no SPIFFE identity";
    return false;
  }
  if (check.server) {
    check.identity = identities.front();
    if (check.identity.trust_domain == check.trust_domain) return true;
    check.failure = Reason::kPeerUntrusted;
    check.detail =
        "the peer is of trust domain " + check.identity.trust_domain + ", not " + check.trust_domain;
    return false;
  }
  for (auto& identity : identities) {
    if (std::find(check.expected.begin(), check.expected.end(), identity.uri()) == check.expected.end())
      continue;
    check.identity = identity;
    return true;
  }
  check.failure = Reason::kPeerIdentityMismatch;
  check.detail = "the server is " + identities.front().uri() + ", expected " +
                 (check.expected.empty() ? "none" : check.expected.front());
  return false;
}

int verifyChainAndIdentity(X509_STORE_CTX* store, PeerCheck& check) {
  if (X509_verify_cert(store) <= 0) {
    check.failure = check.server ? Reason::kPeerUntrusted : Reason::kTlsHandshakeFailed;
    check.detail = std::string("the peer's certificate: ") +
                   X509_verify_cert_error_string(X509_STORE_CTX_get_error(store));
    return 0;
  }
  if (acceptIdentity(check, X509_STORE_CTX_get0_cert(store))) return 1;
  X509_STORE_CTX_set_error(store, X509_V_ERR_APPLICATION_VERIFICATION);
  return 0;
}

// In place of X509_verify_cert: the chain first, then the identity, so that a refusal is an alert within the
// handshake. No exception may pass through OpenSSL.
int verifyPeer(X509_STORE_CTX* store, void*) {
  auto* ssl = static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
  auto& check = *static_cast<PeerCheck*>(SSL_get_app_data(ssl));
  try {
    return verifyChainAndIdentity(store, check);
  } catch (const std::exception&) {
    check.failure = Reason::kInternal;
    X509_STORE_CTX_set_error(store, X509_V_ERR_OUT_OF_MEM);
    return 0;
  }
}

int selectH2(SSL* ssl, const unsigned char** out, unsigned char* out_length, const unsigned char* offered,
             unsigned int offered_length, void*) {
  for (unsigned i = 0; i < offered_length; i += 1u + offered[i]) {
    if (offered[i] == 2 && i + 2 < offered_length && offered[i + 1] == 'h' && offered[i + 2] == '2') {
      *out = offered + i + 1;
      *out_length = 2;
      return SSL_TLSEXT_ERR_OK;
    }
  }
  auto& check = *static_cast<PeerCheck*>(SSL_get_app_data(ssl));
  check.failure = Reason::kH2HandshakeFailed;
  try {
    check.detail = "the peer offers other protocols than HTTP/2 (ALPN h2)";
  } catch (const std::bad_alloc&) {  // then without
  }
  return SSL_TLSEXT_ERR_ALERT_FATAL;
}

// OpenSSL tells secrets only by this callback: "LABEL <client random> <secret>", the last two in hexadecimal.
void takeSecret(const SSL* ssl, const char* line) {
  auto& check = *static_cast<PeerCheck*>(SSL_get_app_data(ssl));
  std::string_view text(line);
  TrafficSecret* secret = text.starts_with("CLIENT_TRAFFIC_SECRET_0 ")   ? &check.client_traffic
                          : text.starts_with("SERVER_TRAFFIC_SECRET_0 ") ? &check.server_traffic
                                                                         : nullptr;
  if (secret == nullptr) return;
  std::string_view digits = text.substr(text.rfind(' ') + 1);
  if (digits.size() / 2 > secret->bytes.size()) return;
  secret->size = digits.size() / 2;
  for (size_t i = 0; i < secret->size; i++) {
    secret->bytes[i] =
        static_cast<uint8_t>(OPENSSL_hexchar2int(static_cast<unsigned char>(digits[2 * i])) << 4 |
                             OPENSSL_hexchar2int(static_cast<unsigned char>(digits[2 * i + 1])));
  }
}

void require(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string(what) + ": " + takeTlsErrors());
}

}  // namespace

std::string takeTlsErrors() {
  std::string text;
  char line[256];
  while (unsigned long error = ERR_get_error()) {
    if (text.size() > 512) continue;
    const char* reason = ERR_reason_error_string(error);
    if (reason == nullptr) {
      ERR_error_string_n(error, line, sizeof line);
      reason = line;
    }
    if (!text.empty()) text += "; ";
    text += reason;
  }
  return text;
}

TlsContext::TlsContext(const Identity& identity, const CertificateBundle& bundle)
    : identity_(identity), context_(SSL_CTX_new(TLS_method())) {
  ERR_clear_error();
  require(context_ != nullptr, "SSL_CTX_new");
  SSL_CTX* context = context_.get();
  require(SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) == 1 &&
              SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) == 1 &&
              SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384") == 1 &&
              SSL_CTX_set1_groups_list(context, "X25519:P-256:P-384") == 1,
          "TLS 1.3 with AES-GCM is not available");
  uint64_t options = SSL_OP_NO_TICKET | SSL_OP_CIPHER_SERVER_PREFERENCE;
  // Certificate compression, on by default where it exists, costs more than the whole handshake.
#ifdef SSL_OP_NO_TX_CERTIFICATE_COMPRESSION
  options |= SSL_OP_NO_TX_CERTIFICATE_COMPRESSION | SSL_OP_NO_RX_CERTIFICATE_COMPRESSION;
#endif
  SSL_CTX_set_options(context, options);
  SSL_CTX_set_num_tickets(context, 0);
  // What a stranger may make us hold and compute before it is known: a workload's chain is short.
  SSL_CTX_set_max_cert_list(context, 32 << 10);
  SSL_CTX_set_verify_depth(context, 8);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(context, SSL_MODE_AUTO_RETRY | SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  SSL_CTX_set_cert_verify_callback(context, verifyPeer, nullptr);
  SSL_CTX_set_keylog_callback(context, takeSecret);
  SSL_CTX_set_alpn_select_cb(context, selectH2, nullptr);
  static const unsigned char kAlpn[] = {2, 'h', '2'};
  require(SSL_CTX_set_alpn_protos(context, kAlpn, sizeof kAlpn) == 0, "ALPN");

  auto chain = certificates(bundle.chain_pem, "certificate chain");
  require(SSL_CTX_use_certificate(context, chain.front().get()) == 1, "cannot use the certificate");
  for (size_t i = 1; i < chain.size(); i++) {
    require(SSL_CTX_add1_chain_cert(context, chain[i].get()) == 1, "cannot use an intermediate certificate");
  }
  KeyPtr key(PEM_read_bio_PrivateKey(textBio(bundle.key_pem).get(), nullptr, nullptr, const_cast<char*>("")));
  require(key != nullptr, "cannot read the private key");
  require(SSL_CTX_use_PrivateKey(context, key.get()) == 1 && SSL_CTX_check_private_key(context) == 1,
          "the private key does not belong to the certificate");
  X509_STORE* store = SSL_CTX_get_cert_store(context);
  for (auto& root : certificates(bundle.roots_pem, "root certificates")) {
    require(X509_STORE_add_cert(store, root.get()) == 1, "cannot use a root certificate");
  }
  // Every certificate given as a root is an anchor, also where it is an intermediate of a larger hierarchy.
  X509_STORE_set_flags(store, X509_V_FLAG_PARTIAL_CHAIN);
}

SSL* TlsContext::create(PeerCheck& check) const {
  SSL* ssl = SSL_new(context_.get());
  if (ssl != nullptr) SSL_set_app_data(ssl, &check);
  return ssl;
}

}  // namespace ebbtide
