// What inbound connections share.
#include "inbound.h"

#include <cerrno>
#include <cstring>

#include "worker.h"

namespace ebbtide {

InboundFlow::InboundFlow(Worker& worker, PodPtr pod, uint32_t descriptors)
    : Flow(worker, std::move(pod), true, descriptors),
      application_(worker, *this, pod_->budget),
      timer_(
          [this] {
            if (record_.destination_workload) {
              application_.close(true);
              onApplication(ETIMEDOUT);
            } else {
              cut(Reason::kUnknownLocalWorkload,
                  pod_->ns + "/" + pod_->name + " is not known to the control plane");
            }
          },
          this) {}

bool InboundFlow::authorize(Reason& reason, std::string& detail) {
  AuthorizationQuery query{peer_, record_.source.ip, record_.destination, record_.destination_workload};
  auto verdict = worker_.state().authorize(query);
  if (verdict.allowed) return true;
  reason = verdict.reason;
  detail = verdict.policy;
  return false;
}

bool InboundFlow::stillAllowed(std::string& policy) {
  Reason reason;
  // Not authorized for the first time yet: that will see the newest policies by itself.
  return !record_.destination_workload || authorize(reason, policy);
}

void InboundFlow::dialApplication(const SocketAddress& to, const std::optional<SocketAddress>& claim) {
  auto [fd, error] = worker_.dialFrom(*pod_, to, claim);
  if (!fd) {
    onApplication(error);
    return;
  }
  // Within a pod the answer to a SYN is usually there before connect() returns.
  int progress = connectProgress(fd.get(), to);
  if (progress == EALREADY || progress == EINPROGRESS) {
    worker_.loop.arm(timer_, worker_.connectTimeoutUs());
    application_.adopt(std::move(fd), true);
    return;
  }
  timer_.cancel();
  if (progress == 0) application_.adoptConnected(std::move(fd));
  onApplication(progress);
}

void InboundFlow::onConnected(SocketEnd&, int error) {
  timer_.cancel();
  if (error != 0) application_.close(true);
  onApplication(error);
}

}  // namespace ebbtide
