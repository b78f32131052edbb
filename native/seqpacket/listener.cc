#include <unistd.h>

#include <cerrno>
#include <utility>

#include "handles.h"
#include "unix_socket.h"

namespace ebbtide::seqpacket {

Napi::Function Listener::define(Napi::Env env) {
  return DefineClass(env, "Listener",
                     {
                         InstanceMethod<&Listener::start>("start"),
                         InstanceMethod<&Listener::pause>("pause"),
                         InstanceMethod<&Listener::accept>("accept"),
                         InstanceMethod<&Listener::close>("close"),
                     });
}

Listener::Listener(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Listener>(info) {
  const auto path = info[0].As<Napi::String>().Utf8Value();
  const auto mode = static_cast<mode_t>(info[1].As<Napi::Number>().Uint32Value());
  const auto listening = listen_at(path, mode, info[2].As<Napi::Number>().Int32Value());
  if (listening.error != 0) throw_system_error(info.Env(), listening.error, "listen");
  const int error = Watch::open(
      info.Env(), listening.value, [this](int, int) { call_back(callback_, "waiting"); }, &socket_);
  if (error != 0) {
    unlink(path.c_str());
    throw_system_error(info.Env(), -error, "uv_poll_init");
  }
}

Listener::~Listener() {
  stop();
}

void Listener::stop() {
  if (socket_ != nullptr) socket_->close();
}

void Listener::start(const Napi::CallbackInfo& info) {
  callback_ = Napi::Persistent(info[0].As<Napi::Function>());
  const int error = socket_ == nullptr ? UV_EBADF : socket_->set_events(UV_READABLE);
  if (error != 0) throw_system_error(info.Env(), -error, "uv_poll_start");
}

void Listener::pause(const Napi::CallbackInfo& info) {
  if (socket_ != nullptr) socket_->set_events(info[0].ToBoolean() ? 0 : UV_READABLE);
}

Napi::Value Listener::accept(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (socket_ == nullptr) return env.Null();
  const auto accepted = accept_from(socket_->fd());
  if (accepted.error == EAGAIN) return env.Null();
  if (accepted.error != 0) throw_system_error(env, accepted.error, "accept");
  int fd = accepted.value;
  try {
    return env.GetInstanceData<AddonData>()->connection.New({Napi::External<int>::New(env, &fd)});
  } catch (...) {
    // Where the constructor took the descriptor it has closed it too.
    if (fd >= 0) ::close(fd);
    throw;
  }
}

void Listener::close(const Napi::CallbackInfo&) {
  stop();
  callback_.Reset();
}

}  // namespace ebbtide::seqpacket
