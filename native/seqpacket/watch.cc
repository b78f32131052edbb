#include "watch.h"

#include <unistd.h>

#include <utility>

namespace ebbtide::seqpacket {

int Watch::open(Napi::Env env, int fd, Listener listener, Watch** slot) {
  uv_loop_t* loop = nullptr;
  if (napi_get_uv_event_loop(env, &loop) != napi_ok) {
    ::close(fd);
    return UV_EINVAL;
  }
  auto* watch = new Watch(fd, std::move(listener), slot);
  watch->poll_.data = watch;
  if (const int error = uv_poll_init(loop, &watch->poll_, fd); error != 0) {
    ::close(fd);
    delete watch;
    return error;
  }
  // Worker threads end while their loop lives on: the handle must be gone before the loop is.
  napi_add_async_cleanup_hook(env, &Watch::on_environment_end, watch, &watch->hook_);
  *slot = watch;
  return 0;
}

int Watch::set_events(int events) {
  if (fd_ < 0) return UV_EBADF;
  if (events == 0) return uv_poll_stop(&poll_);
  return uv_poll_start(&poll_, events, [](uv_poll_t* handle, int status, int ready) {
    auto* watch = static_cast<Watch*>(handle->data);
    // A copy: the listener may close the watch, which drops it.
    const Listener listener = watch->listener_;
    if (listener) listener(status, ready);
  });
}

void Watch::close() {
  if (fd_ < 0) return;
  uv_poll_stop(&poll_);
  // After the stop, since the loop knows the descriptor by its number.
  ::close(std::exchange(fd_, -1));
  listener_ = nullptr;
  *slot_ = nullptr;
  uv_close(reinterpret_cast<uv_handle_t*>(&poll_), [](uv_handle_t* handle) {
    auto* watch = static_cast<Watch*>(handle->data);
    napi_remove_async_cleanup_hook(watch->hook_);
    delete watch;
  });
}

void Watch::on_environment_end(napi_async_cleanup_hook_handle, void* data) {
  static_cast<Watch*>(data)->close();
}

}  // namespace ebbtide::seqpacket
