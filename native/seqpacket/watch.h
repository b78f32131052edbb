// One descriptor watched by the event loop of the Node environment that uses it.
#pragma once

#include <napi.h>
#include <uv.h>

#include <functional>
#include <utility>

namespace ebbtide::seqpacket {

// Owns a descriptor and its poll handle. All calls are on the environment's thread. The object outlives
// `close` until the loop has let go of the handle, so it is made by `open` and never deleted by its user.
// Ends with the environment by itself.
class Watch {
 public:
  using Listener = std::function<void(int status, int events)>;

  // Takes over the descriptor, also on failure. `slot` belongs to the user and points to the watch until that
  // is closed, by whomever. 0 or a negative libuv error.
  static int open(Napi::Env env, int fd, Listener listener, Watch** slot);

  int fd() const { return fd_; }

  // Events of uv_poll_event; 0 stops. 0 or a negative libuv error.
  int set_events(int events);

  // The loop does not go on because of this watch alone.
  void unref() { uv_unref(reinterpret_cast<uv_handle_t*>(&poll_)); }

  // Closes the descriptor at once and calls the listener no more.
  void close();

  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  Watch(int fd, Listener listener, Watch** slot) : fd_(fd), listener_(std::move(listener)), slot_(slot) {}
  ~Watch() = default;
  static void on_environment_end(napi_async_cleanup_hook_handle hook, void* data);

  uv_poll_t poll_{};
  int fd_;
  Listener listener_;
  Watch** slot_;
  napi_async_cleanup_hook_handle hook_ = nullptr;
};

}  // namespace ebbtide::seqpacket
