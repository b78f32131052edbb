// Two nodes in one process: engines, certificates, and pods as network namespaces with the redirect rules of
// istio-cni, so that captured connections come to the engine exactly as from a real node agent. Everything
// vanishes with the process.
#pragma once

#include <openssl/evp.h>
#include <openssl/x509.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"

namespace ebbtide::test {

// A certificate authority for tests.
class Authority {
 public:
  struct Request {
    std::string uri;           // URI SAN, "" for none
    long valid_from_s = -300;  // from now
    long valid_to_s = 3600;
    bool client_auth = true;
    std::string more_uris = "";  // further SANs as OpenSSL writes them: ",URI:.."
    std::string usage = "";      // extended key usage; "none" for no such extension, "" as client_auth says
  };
  explicit Authority(const std::string& name = "test root", long valid_to_s = 7200);
  // An intermediate, signed by this one. What it issues comes with the chain up to the root, which is this
  // one's.
  Authority intermediate(const std::string& name) const;
  CertificateBundle issue(const Request& request) const;
  CertificateBundle issue(const std::string& uri) const {
    Request request;
    request.uri = uri;
    return issue(request);
  }
  const std::string& pem() const { return pem_; }

 private:
  std::shared_ptr<EVP_PKEY> key_;
  std::shared_ptr<X509> certificate_;
  std::string pem_, chain_;  // chain_: certificates between what is issued and the root
};

// A network namespace that lives as long as the object.
class Netns {
 public:
  Netns();
  ~Netns();
  Netns(const Netns&) = delete;
  int fd() const { return fd_; }
  int duplicate() const;
  // Shell command inside; throws with the command when it fails.
  void run(const std::string& command) const;
  // In a thread that is inside.
  void within(const std::function<void()>& work) const;

 private:
  int fd_ = -1;
};

// Blocking TCP with a deadline on every call; -1 with errno when it fails.
class Tcp {
 public:
  explicit Tcp(int fd = -1) : fd_(fd) {}
  Tcp(Tcp&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Tcp& operator=(Tcp&& other) noexcept;
  ~Tcp() { close(); }
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close();
  void abort();   // RST
  void finish();  // FIN
  bool send(const std::string& data);
  // Until `n` bytes, the end or an error; errno is 0 at the end.
  std::string receive(size_t n);
  std::string receiveAll();
  // True when the next read says ECONNRESET.
  bool isReset();

 private:
  int fd_;
};

Tcp connectTo(const Netns& from, const std::string& ip, uint16_t port);
Tcp listenOn(const Netns& in, uint16_t port);
Tcp acceptFrom(const Tcp& listener);
SocketAddress peerOf(const Tcp& connection);

// Collects what an engine reports.
class Collector final : public EngineEvents {
 public:
  void onAccess(std::vector<AccessRecord> records) override;
  void onCertificateNeeded(const std::string& identity) override;
  void onFault(const char* where, const char* what) override;
  // The first record that fits, waiting at most `seconds`; null when none came.
  std::shared_ptr<AccessRecord> wait(const std::function<bool(const AccessRecord&)>& fits, int seconds = 10);
  size_t count();
  std::vector<std::string> needed();
  // "where: what" of each fault.
  std::vector<std::string> faults();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<AccessRecord> records_;
  std::vector<std::string> needed_, faults_;
};

// Node "one" has the pod 10.77.0.1 ("client"), node "two" the pod 10.77.0.2 ("server").
class Lab {
 public:
  explicit Lab(std::function<void(EngineConfig&)> adjust = nullptr);
  ~Lab();

  static constexpr const char* kClientIp = "10.77.0.1";
  static constexpr const char* kServerIp = "10.77.0.2";
  static constexpr const char* kClientUri = "spiffe://cluster.local/ns/default/sa/client";
  static constexpr const char* kServerUri = "spiffe://cluster.local/ns/default/sa/server";

  Workload workload(const std::string& name, const std::string& ip, const std::string& node) const;
  // To both engines.
  void apply(const StateDelta& delta);
  void allowOnlyMesh();  // a STRICT policy on the server

  Authority authority;
  Collector one_events, two_events;
  Netns client, server;
  std::unique_ptr<Engine> one, two;
};

}  // namespace ebbtide::test
