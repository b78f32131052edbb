// Plain TCP to a pod: no identity, so that only policy that asks for none lets it in.
#include <cstring>

#include "inbound.h"
#include "worker.h"

namespace ebbtide {

InboundPlainFlow::InboundPlainFlow(Worker& worker, PodPtr pod, Fd client)
    : InboundFlow(worker, std::move(pod), 2), client_(worker, *this, pod_->budget) {
  client_.adopt(std::move(client), false);
}

void InboundPlainFlow::begin() {
  auto source = peerAddress(client_.fd());
  auto destination = originalDestination(client_.fd());
  if (!source || !destination) {
    cut(Reason::kInternal, "the connection's addresses cannot be read");
    return;
  }
  record_.source = *source;
  record_.destination = *destination;
  if (isMeshPort(destination->port)) {
    cut(Reason::kIllegalPort, "the mesh's own port");
    return;
  }
  worker_.loop.arm(timer_, worker_.localTimeoutUs());
  resolve();
}

void InboundPlainFlow::resolve() {
  auto workload = worker_.localWorkload(*pod_);
  if (!workload) {
    worker_.wait(*this);
    return;
  }
  timer_.cancel();
  record_.destination_workload = workload;
  record_.source_workload = worker_.state().workloadByIp(record_.source.ip);
  Reason reason;
  std::string detail;
  if (!authorize(reason, detail)) {
    cut(reason, detail);
    return;
  }
  dialApplication(record_.destination, record_.source);
}

void InboundPlainFlow::onApplication(int error) {
  if (error != 0) {
    Reason reason = error == ECONNREFUSED ? Reason::kConnectRefused
                    : error == ETIMEDOUT  ? Reason::kConnectTimeout
                                          : Reason::kConnectFailed;
    cut(reason, std::string("connect to the application: ") + std::strerror(error));
    return;
  }
  establish();
  relay_ = std::make_unique<SocketRelay>(worker_, *this, application_, client_);
  relay_->start();
}

void InboundPlainFlow::onBroken(SocketEnd& end, int error) {
  if (&end == &application_) {
    onConnected(end, error);
  } else {
    cut(Reason::kApplicationReset, std::string("the client left: ") + std::strerror(error));
  }
}

void InboundPlainFlow::closeSides() {
  timer_.cancel();
  client_.close(true);
  application_.close(true);
}

}  // namespace ebbtide
