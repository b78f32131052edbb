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

}  // namespace ebbtide::capture
