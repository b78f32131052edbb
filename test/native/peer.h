// A peer of the engine's HBONE port that does what a test tells it, right or wrong.
#pragma once

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>

#include "lab.h"
#include "socket.h"

namespace ebbtide::test {

// A bare connection from the client's pod to the server's HBONE port, past the redirect rules.
// `source`: an address of the client's pod, "" for its first.
inline Tcp rawTunnel(const Lab& lab, const std::string& source = "") {
  int fd = -1;
  std::optional<SocketAddress> claim;
  if (!source.empty()) claim = SocketAddress{*IpAddress::parse(source), 0};
  lab.client.within(
      [&] { fd = dial({*IpAddress::parse(Lab::kServerIp), kHbonePort}, claim, false).fd.release(); });
  pollfd ready{fd, POLLOUT, 0};
  poll(&ready, 1, 5000);
  fcntl(fd, F_SETFL, 0);
  timeval limit{10, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  return Tcp(fd);
}

inline const std::string kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + std::string("\0\0\0\4\0\0\0\0\0", 9);

// A CONNECT request without compression state: every field literal, none indexed.
inline std::string connectFrame(uint32_t stream, const std::string& authority) {
  auto literal = [](char index, const std::string& value) {
    return std::string(1, index) + static_cast<char>(value.size()) + value;
  };
  std::string block = literal('\x02', "CONNECT") + literal('\x01', authority);  // :method, :authority
  std::string frame = {0, 0, static_cast<char>(block.size()), 1, 4};
  for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift);
  return frame + block;
}

inline std::string resetFrame(uint32_t stream) {
  std::string frame("\0\0\4\3\0", 5);
  for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(stream >> shift);
  return frame + std::string("\0\0\0\x8", 4);  // CANCEL
}

// WINDOW_UPDATE.
inline std::string windowFrame(uint32_t stream, uint32_t increment) {
  std::string frame("\0\0\4\x8\0", 5);
  for (uint32_t word : {stream, increment}) {
    for (int shift = 24; shift >= 0; shift -= 8) frame += static_cast<char>(word >> shift);
  }
  return frame;
}

// A TLS client that does what it is told, right or wrong.
class TlsClient {
 public:
  struct Options {
    const CertificateBundle* certificate = nullptr;
    int max_version = TLS1_3_VERSION;
    const char* alpn = "h2";
    int receive_buffer = 0;
  };
  TlsClient(const Lab& lab, const Options& options) : TlsClient(rawTunnel(lab), options) {}
  // On a connection to the HBONE port that exists already.
  TlsClient(Tcp tcp, const Options& options) : tcp_(std::move(tcp)) {
    if (options.receive_buffer > 0) {
      setsockopt(tcp_.fd(), SOL_SOCKET, SO_RCVBUF, &options.receive_buffer, sizeof options.receive_buffer);
    }
    context_ = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_max_proto_version(context_, options.max_version);
    if (options.certificate != nullptr) use(*options.certificate);
    ssl_ = SSL_new(context_);
    if (options.alpn != nullptr) {
      std::string list = std::string(1, static_cast<char>(std::strlen(options.alpn))) + options.alpn;
      SSL_set_alpn_protos(ssl_, reinterpret_cast<const unsigned char*>(list.data()),
                          static_cast<unsigned>(list.size()));
    }
    SSL_set_fd(ssl_, tcp_.fd());
    connected = SSL_connect(ssl_) == 1;
    // In TLS 1.3 the client is done before the server looked at its certificate: the first read tells. A
    // server of HTTP/2 speaks first.
    char first[9];
    accepted = connected && SSL_read(ssl_, first, sizeof first) == sizeof first;
  }
  ~TlsClient() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }
  bool write(const std::string& data) {
    return SSL_write(ssl_, data.data(), static_cast<int>(data.size())) > 0;
  }
  bool newKeys(bool both) {
    return SSL_key_update(ssl_, both ? SSL_KEY_UPDATE_REQUESTED : SSL_KEY_UPDATE_NOT_REQUESTED) == 1;
  }
  // Sends what is pending, such as new keys.
  bool handshake() { return SSL_do_handshake(ssl_) == 1; }
  bool readUntil(const std::string& text) {
    std::string got;
    char buffer[4096];
    for (int n; (n = SSL_read(ssl_, buffer, sizeof buffer)) > 0;) {
      got.append(buffer, static_cast<size_t>(n));
      if (got.find(text) != std::string::npos) return true;
    }
    return false;
  }
  // Reads until the server closes; true when it did within the socket's time limit.
  bool closedByServer() {
    char buffer[4096];
    int n;
    do {
      n = SSL_read(ssl_, buffer, sizeof buffer);
    } while (n > 0);
    return !(SSL_get_error(ssl_, n) == SSL_ERROR_SYSCALL && errno == EAGAIN);
  }
  bool connected, accepted;

 private:
  void use(const CertificateBundle& bundle) {
    BIO* chain = BIO_new_mem_buf(bundle.chain_pem.data(), -1);
    X509* certificate = PEM_read_bio_X509(chain, nullptr, nullptr, nullptr);
    SSL_CTX_use_certificate(context_, certificate);
    X509_free(certificate);
    while (X509* more = PEM_read_bio_X509(chain, nullptr, nullptr, nullptr)) {
      SSL_CTX_add1_chain_cert(context_, more);
      X509_free(more);
    }
    ERR_clear_error();
    BIO_free(chain);
    BIO* text = BIO_new_mem_buf(bundle.key_pem.data(), -1);
    EVP_PKEY* key = PEM_read_bio_PrivateKey(text, nullptr, nullptr, nullptr);
    SSL_CTX_use_PrivateKey(context_, key);
    EVP_PKEY_free(key);
    BIO_free(text);
  }
  Tcp tcp_;
  SSL_CTX* context_;
  SSL* ssl_;
};

}  // namespace ebbtide::test
