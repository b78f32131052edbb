#include <unistd.h>

#include <cerrno>
#include <utility>

#include "handles.h"
#include "unix_socket.h"

namespace ebbtide::seqpacket {

Napi::Function Connection::define(Napi::Env env) {
  return DefineClass(env, "Connection",
                     {
                         InstanceMethod<&Connection::start>("start"),
                         InstanceMethod<&Connection::send>("send"),
                         InstanceMethod<&Connection::receive>("receive"),
                         InstanceMethod<&Connection::want_writable>("wantWritable"),
                         InstanceMethod<&Connection::close>("close"),
                         InstanceMethod<&Connection::peer_alive>("peerAlive"),
                         InstanceAccessor<&Connection::peer>("peer"),
                     });
}

Connection::Connection(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Connection>(info) {
  const Napi::Env env = info.Env();
  // Listener.accept gives its descriptor wrapped, which JavaScript cannot make.
  if (info[0].IsExternal()) {
    int* fd = info[0].As<Napi::External<int>>().Data();
    adopt(env, std::exchange(*fd, -1));
    return;
  }
  const auto connected = connect_to(info[0].As<Napi::String>().Utf8Value());
  if (connected.error != 0) throw_system_error(env, connected.error, "connect");
  adopt(env, connected.value);
}

Connection::~Connection() {
  stop();
}

void Connection::adopt(Napi::Env env, int fd) {
  const auto peer = peer_of(fd);
  // Opened before anything else happens, so that the process id has had no time to be used again.
  const auto pidfd = peer.error == 0 ? peer_pidfd(fd, peer.value.pid) : Result<int>{peer.error, -1};
  if (pidfd.error != 0) {
    ::close(fd);
    throw_system_error(env, pidfd.error, peer.error == 0 ? "pidfd of the peer" : "SO_PEERCRED");
  }
  int error = Watch::open(
      env, fd,
      [this](int status, int events) {
        // An error is found again, with its name, by the call that comes next.
        if (status != 0 || (events & (UV_READABLE | UV_DISCONNECT)) != 0) emit("readable");
        if ((events & UV_WRITABLE) != 0) emit("writable");
      },
      &socket_);
  if (error == 0) {
    error = Watch::open(env, pidfd.value, [this](int, int) { on_process_end(); }, &process_);
  } else {
    ::close(pidfd.value);
  }
  if (error != 0) {
    stop();
    throw_system_error(env, -error, "uv_poll_init");
  }
  process_->unref();
  auto described = Napi::Object::New(env);
  described.Set("pid", Napi::Number::New(env, peer.value.pid));
  described.Set("uid", Napi::Number::New(env, peer.value.uid));
  described.Set("gid", Napi::Number::New(env, peer.value.gid));
  peer_ = Napi::Persistent(described);
}

void Connection::emit(const char* event) {
  call_back(callback_, event);
}

void Connection::on_process_end() {
  // It ends once, and its descriptor stays readable.
  process_->close();
  emit("peerExit");
  if (socket_ == nullptr) callback_.Reset();
}

void Connection::stop() {
  if (socket_ != nullptr) socket_->close();
  if (process_ != nullptr) process_->close();
}

void Connection::start(const Napi::CallbackInfo& info) {
  callback_ = Napi::Persistent(info[0].As<Napi::Function>());
  int error = socket_ == nullptr ? UV_EBADF : socket_->set_events(UV_READABLE | UV_DISCONNECT);
  if (error == 0 && process_ != nullptr) error = process_->set_events(UV_READABLE);
  if (error != 0) throw_system_error(info.Env(), -error, "uv_poll_start");
}

void Connection::want_writable(const Napi::CallbackInfo& info) {
  if (socket_ == nullptr) return;
  const int more = info[0].ToBoolean() ? UV_WRITABLE : 0;
  const int error = socket_->set_events(UV_READABLE | UV_DISCONNECT | more);
  if (error != 0) throw_system_error(info.Env(), -error, "uv_poll_start");
}

Napi::Value Connection::send(const Napi::CallbackInfo& info) {
  if (socket_ == nullptr) throw_system_error(info.Env(), EPIPE, "sendmsg");
  const auto data = info[0].As<Napi::Uint8Array>();
  const int fd = info[1].As<Napi::Number>().Int32Value();
  const int error = send_message(socket_->fd(), data.Data(), data.ByteLength(), fd);
  if (error == EAGAIN) return Napi::Boolean::New(info.Env(), false);
  if (error != 0) throw_system_error(info.Env(), error, "sendmsg");
  return Napi::Boolean::New(info.Env(), true);
}

Napi::Value Connection::receive(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (socket_ == nullptr) return env.Undefined();
  Message message;
  const int error = receive_message(socket_->fd(), &message);
  if (error == EAGAIN) return env.Null();
  if (error != 0) throw_system_error(env, error, "recvmsg");
  if (message.size == 0) {
    message.close_fds();
    return env.Undefined();
  }
  try {
    auto result = Napi::Object::New(env);
    result.Set("data", Napi::Buffer<std::uint8_t>::Copy(env, message.data.data(), message.size));
    auto fds = Napi::Array::New(env, message.fd_count);
    for (std::uint32_t i = 0; i < message.fd_count; i++) fds.Set(i, Napi::Number::New(env, message.fds[i]));
    result.Set("fds", fds);
    result.Set("truncated", Napi::Boolean::New(env, message.truncated));
    return result;
  } catch (...) {
    message.close_fds();
    throw;
  }
}

void Connection::close(const Napi::CallbackInfo& info) {
  if (socket_ != nullptr) socket_->close();
  if (process_ != nullptr && !info[0].ToBoolean()) process_->close();
  if (process_ == nullptr) callback_.Reset();
}

Napi::Value Connection::peer(const Napi::CallbackInfo&) {
  return peer_.Value();
}

Napi::Value Connection::peer_alive(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), process_ != nullptr && is_running(process_->fd()));
}

}  // namespace ebbtide::seqpacket
