// The one exception of native/capture: what was tried, errno, and the verifier's log where there is one.
#pragma once

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace ebbtide::capture {

struct CaptureError : std::runtime_error {
  // `error` is an errno, 0 when no system call failed. `hint` says what to do next, may be empty.
  CaptureError(const std::string& tried, int error, const std::string& hint = "", std::string log_text = "")
      : std::runtime_error(tried + (error ? std::string(": ") + std::strerror(error) : "") +
                           (hint.empty() ? "" : " (" + hint + ")")),
        number(error),
        log(std::move(log_text)) {}
  int number;
  std::string log;
};

// Why pins cannot be used although nothing failed: another process holds them, an agent's are there where a
// boot guard would begin, or another version's.
struct PinsLocked : CaptureError {
  using CaptureError::CaptureError;
};
struct AgentPinned : CaptureError {
  using CaptureError::CaptureError;
};
struct OtherVersionPinned : CaptureError {
  using CaptureError::CaptureError;
};

}  // namespace ebbtide::capture
