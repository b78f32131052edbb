// A workload's TLS side: its certificate, key and trust anchors as an SSL_CTX of one worker, and the checks
// that make a peer's certificate a mesh identity.
#pragma once

#include <openssl/ssl.h>

#include <memory>
#include <string>
#include <vector>

#include "model.h"
#include "reason.h"
#include "tls_records.h"

namespace ebbtide {

struct CertificateBundle;

// What is asked of a peer's certificate, and what was found. Lives as long as its SSL.
struct PeerCheck {
  // Client side: SPIFFE URIs of which the server must hold at least one. Server side: unused.
  std::vector<std::string> expected;
  std::string trust_domain;  // server side: the client's first SPIFFE identity must be of it
  bool server = false;

  Identity identity;  // server side: the first URI SAN that parses; client side: the one that was expected
  Reason failure = Reason::kNone;
  std::string detail;

  // Secrets of the application data's keys, as the handshake brings them forth.
  TrafficSecret client_traffic, server_traffic;
};

class TlsContext {
 public:
  // Throws std::runtime_error naming what is wrong with the bundle.
  TlsContext(const Identity& identity, const CertificateBundle& bundle);

  // TLS 1.3 only, client certificates mandatory, ALPN h2. `check` outlives the SSL. Null when out of memory.
  SSL* create(PeerCheck& check) const;
  const Identity& identity() const { return identity_; }

 private:
  struct Free {
    void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
  };
  Identity identity_;
  std::unique_ptr<SSL_CTX, Free> context_;
};

// The thread's OpenSSL errors as text, oldest first; empties the queue.
std::string takeTlsErrors();

}  // namespace ebbtide
