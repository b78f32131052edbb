// Two nodes in one process.
#include "lab.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "socket.h"

namespace ebbtide::test {
namespace {

std::string pemOf(const std::function<int(BIO*)>& write) {
  BIO* bio = BIO_new(BIO_s_mem());
  write(bio);
  char* data = nullptr;
  long n = BIO_get_mem_data(bio, &data);
  std::string text(data, static_cast<size_t>(n));
  BIO_free(bio);
  return text;
}

void addExtension(X509* certificate, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx(&context, issuer, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
  if (extension == nullptr) throw std::runtime_error("bad extension " + value);
  X509_add_ext(certificate, extension, -1);
  X509_EXTENSION_free(extension);
}

std::shared_ptr<EVP_PKEY> newKey() {
  return {EVP_EC_gen("P-256"), EVP_PKEY_free};
}

std::shared_ptr<X509> newCertificate(EVP_PKEY* key, const std::string& name, long from, long to) {
  static std::atomic<long> serial{1};
  std::shared_ptr<X509> certificate(X509_new(), X509_free);
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), serial++);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), from);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), to);
  X509_set_pubkey(certificate.get(), key);
  if (!name.empty()) {
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate.get()), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  }
  return certificate;
}

void setTimeouts(int fd) {
  timeval limit{20, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

}  // namespace

Authority::Authority(const std::string& name, long valid_to_s) : key_(newKey()) {
  certificate_ = newCertificate(key_.get(), name, -600, valid_to_s);
  X509_set_issuer_name(certificate_.get(), X509_get_subject_name(certificate_.get()));
  addExtension(certificate_.get(), certificate_.get(), NID_basic_constraints, "critical,CA:TRUE");
  addExtension(certificate_.get(), certificate_.get(), NID_key_usage, "critical,keyCertSign,cRLSign");
  X509_sign(certificate_.get(), key_.get(), EVP_sha256());
  pem_ = pemOf([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate_.get()); });
}

Authority Authority::intermediate(const std::string& name) const {
  Authority made(*this);
  made.key_ = newKey();
  made.certificate_ = newCertificate(made.key_.get(), name, -600, 7200);
  X509* raw = made.certificate_.get();
  X509_set_issuer_name(raw, X509_get_subject_name(certificate_.get()));
  addExtension(raw, certificate_.get(), NID_basic_constraints, "critical,CA:TRUE");
  addExtension(raw, certificate_.get(), NID_key_usage, "critical,keyCertSign,cRLSign");
  X509_sign(raw, key_.get(), EVP_sha256());
  made.chain_ = pemOf([&](BIO* bio) { return PEM_write_bio_X509(bio, raw); }) + chain_;
  return made;
}

CertificateBundle Authority::issue(const Request& request) const {
  auto key = newKey();
  auto certificate = newCertificate(key.get(), "", request.valid_from_s, request.valid_to_s);
  X509_set_issuer_name(certificate.get(), X509_get_subject_name(certificate_.get()));
  addExtension(certificate.get(), certificate_.get(), NID_key_usage, "critical,digitalSignature");
  std::string usage = request.client_auth ? "serverAuth,clientAuth" : "serverAuth";
  if (!request.usage.empty()) usage = request.usage;
  if (usage != "none") addExtension(certificate.get(), certificate_.get(), NID_ext_key_usage, usage);
  if (!request.uri.empty()) {
    addExtension(certificate.get(), certificate_.get(), NID_subject_alt_name,
                 "critical,URI:" + request.uri + request.more_uris);
  }
  X509_sign(certificate.get(), key_.get(), EVP_sha256());
  CertificateBundle bundle;
  bundle.chain_pem = pemOf([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate.get()); });
  bundle.chain_pem += chain_;
  bundle.key_pem = pemOf([&](BIO* bio) {
    return PEM_write_bio_PKCS8PrivateKey(bio, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
  });
  bundle.roots_pem = pem_;
  return bundle;
}

Netns::Netns() {
  std::thread maker([this] {
    if (unshare(CLONE_NEWNET) != 0) return;
    fd_ = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
  });
  maker.join();
  if (fd_ < 0) throw std::runtime_error("cannot create a network namespace (needs root)");
}

Netns::~Netns() {
  close(fd_);
}

int Netns::duplicate() const {
  return fcntl(fd_, F_DUPFD_CLOEXEC, 3);
}

void Netns::run(const std::string& command) const {
  pid_t child = fork();
  if (child == 0) {
    if (setns(fd_, CLONE_NEWNET) != 0) _exit(126);
    execl("/bin/sh", "sh", "-ec", command.c_str(), nullptr);
    _exit(127);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0)
    throw std::runtime_error("failed in namespace: " + command);
}

void Netns::within(const std::function<void()>& work) const {
  std::exception_ptr failure;
  std::thread inside([&] {
    try {
      if (setns(fd_, CLONE_NEWNET) != 0) throw std::runtime_error("setns");
      work();
    } catch (...) {
      failure = std::current_exception();
    }
  });
  inside.join();
  if (failure) std::rethrow_exception(failure);
}

Tcp& Tcp::operator=(Tcp&& other) noexcept {
  close();
  fd_ = other.fd_;
  other.fd_ = -1;
  return *this;
}

void Tcp::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void Tcp::abort() {
  resetOnClose(fd_);
  close();
}

void Tcp::finish() {
  shutdown(fd_, SHUT_WR);
}

bool Tcp::send(const std::string& data) {
  size_t sent = 0;
  while (sent < data.size()) {
    ssize_t n = ::send(fd_, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

std::string Tcp::receive(size_t n) {
  std::string data(n, '\0');
  size_t got = 0;
  while (got < n) {
    errno = 0;
    ssize_t part = recv(fd_, data.data() + got, n - got, 0);
    if (part <= 0) break;
    got += static_cast<size_t>(part);
  }
  data.resize(got);
  return data;
}

std::string Tcp::receiveAll() {
  std::string data;
  for (;;) {
    std::string part = receive(65536);
    data += part;
    if (part.size() < 65536) return data;
  }
}

bool Tcp::isReset() {
  char byte;
  ssize_t n;
  do {
    n = recv(fd_, &byte, 1, 0);
  } while (n > 0);
  return n < 0 && errno == ECONNRESET;
}

Tcp connectTo(const Netns& from, const std::string& ip, uint16_t port) {
  int fd = -1, failure = 0;
  from.within([&] {
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setTimeouts(fd);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    inet_pton(AF_INET, ip.c_str(), &to.sin_addr);
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) {
      failure = errno;
      close(fd);
      fd = -1;
    }
  });
  errno = failure;
  return Tcp(fd);
}

Tcp listenOn(const Netns& in, uint16_t port) {
  int fd = -1;
  in.within([&] {
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setTimeouts(fd);
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in any{};
    any.sin_family = AF_INET;
    any.sin_port = htons(port);
    if (bind(fd, reinterpret_cast<sockaddr*>(&any), sizeof any) != 0 || listen(fd, 4096) != 0) {
      throw std::runtime_error(std::string("listen: ") + std::strerror(errno));
    }
  });
  return Tcp(fd);
}

Tcp acceptFrom(const Tcp& listener) {
  int fd = accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC);
  if (fd >= 0) setTimeouts(fd);
  return Tcp(fd);
}

SocketAddress peerOf(const Tcp& connection) {
  return peerAddress(connection.fd()).value_or(SocketAddress{});
}

void Collector::onAccess(std::vector<AccessRecord> records) {
  std::lock_guard lock(mutex_);
  for (auto& record : records) records_.push_back(std::move(record));
  changed_.notify_all();
}

void Collector::onCertificateNeeded(const std::string& identity) {
  std::lock_guard lock(mutex_);
  needed_.push_back(identity);
}

void Collector::onFault(const char* where, const char* what) {
  std::lock_guard lock(mutex_);
  faults_.push_back(std::string(where) + ": " + what);
}

std::vector<std::string> Collector::faults() {
  std::lock_guard lock(mutex_);
  return faults_;
}

std::shared_ptr<AccessRecord> Collector::wait(const std::function<bool(const AccessRecord&)>& fits,
                                              int seconds) {
  std::unique_lock lock(mutex_);
  std::shared_ptr<AccessRecord> found;
  changed_.wait_for(lock, std::chrono::seconds(seconds), [&] {
    for (auto& record : records_) {
      if (!fits(record)) continue;
      found = std::make_shared<AccessRecord>(record);
      return true;
    }
    return false;
  });
  return found;
}

size_t Collector::count() {
  std::lock_guard lock(mutex_);
  return records_.size();
}

std::vector<std::string> Collector::needed() {
  std::lock_guard lock(mutex_);
  return needed_;
}

namespace {

// The rules istio-cni gives a pod, as nftables.
constexpr const char* kRules = R"(
ip link set lo up
ip rule add fwmark 0x111/0xfff lookup 100 pref 32764
ip route add local default dev lo table 100
nft -f - <<'END'
table inet mesh {
  chain mangle_in { type filter hook prerouting priority mangle; meta mark & 0xfff == 0x539 ct mark set 0x111; }
  chain mangle_out { type route hook output priority mangle; ct mark & 0xfff == 0x111 meta mark set 0x111; }
  chain nat_in { type nat hook prerouting priority dstnat;
    meta l4proto tcp ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006; }
  chain nat_out { type nat hook output priority -100;
    meta l4proto tcp ct mark & 0xfff == 0x111 accept
    meta l4proto tcp oifname "lo" ip daddr != 127.0.0.1 accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001; }
}
END
)";

}  // namespace

Lab::Lab(std::function<void(EngineConfig&)> adjust) {
  client.run(kRules);
  server.run(kRules);
  std::string peer = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(server.fd());
  client.run("ip link add mesh0 type veth peer name mesh1; ip link set mesh1 netns " + peer +
             "; ip addr add 10.77.0.1/24 dev mesh0; ip link set mesh0 up");
  server.run("ip addr add 10.77.0.2/24 dev mesh1; ip link set mesh1 up");

  auto make = [&](const char* node, Collector& events) {
    EngineConfig config;
    config.workers = 1;
    config.state.node_name = node;
    config.state.cluster_id = "Kubernetes";
    if (adjust) adjust(config);
    auto engine = std::make_unique<Engine>(config, events);
    engine->start();
    return engine;
  };
  one = make("one", one_events);
  two = make("two", two_events);
  StateDelta delta;
  delta.workloads = {workload("client", kClientIp, "one"), workload("server", kServerIp, "two")};
  apply(delta);
  one->setCertificate(kClientUri, authority.issue(kClientUri));
  two->setCertificate(kServerUri, authority.issue(kServerUri));
  one->addPod({"client-uid", "client", "default", "client", client.duplicate()});
  two->addPod({"server-uid", "server", "default", "server", server.duplicate()});
}

Lab::~Lab() {
  one->stopNow();
  two->stopNow();
}

Workload Lab::workload(const std::string& name, const std::string& ip, const std::string& node) const {
  Workload workload;
  workload.uid = "Kubernetes//Pod/default/" + name;
  workload.name = name;
  workload.ns = "default";
  workload.addresses = {*IpAddress::parse(ip)};
  workload.protocol = TunnelProtocol::kHbone;
  workload.trust_domain = "cluster.local";
  workload.service_account = name;
  workload.node = node;
  workload.workload_name = name;
  workload.workload_type = "pod";
  workload.canonical_name = name;
  workload.cluster_id = "Kubernetes";
  return workload;
}

void Lab::apply(const StateDelta& delta) {
  one->apply(delta);
  two->apply(delta);
}

void Lab::allowOnlyMesh() {
  Policy strict;
  strict.name = "strict";
  strict.ns = "default";
  strict.action = Policy::Action::kDeny;
  PolicyMatch match;
  match.principals.none_of = {{StringMatch::Kind::kPresence, ""}};
  strict.rules = {{{match}}};
  StateDelta delta;
  delta.policies = {strict};
  Workload changed = workload("server", kServerIp, "two");
  changed.authorization_policies = {strict.key()};
  delta.workloads = {changed};
  apply(delta);
}

}  // namespace ebbtide::test
