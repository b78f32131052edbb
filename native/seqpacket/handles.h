// The two JavaScript classes of the addon: a listener and a connection. Policy (queues, rates, limits) is in
// TypeScript.
#pragma once

#include <napi.h>

#include "watch.h"

namespace ebbtide::seqpacket {

struct AddonData {
  Napi::FunctionReference connection;
};

// new Connection(path): connects. Also made by Listener.accept.
class Connection : public Napi::ObjectWrap<Connection> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Connection(const Napi::CallbackInfo& info);
  ~Connection() override;

 private:
  // start((event: 'readable' | 'writable' | 'peerExit') => void): calls back until close.
  void start(const Napi::CallbackInfo& info);
  // send(data, fd | -1): true when sent, false when the buffer is full. Throws.
  Napi::Value send(const Napi::CallbackInfo& info);
  // receive(): {data, fds, truncated}; null when nothing is there; undefined at the end. Throws.
  Napi::Value receive(const Napi::CallbackInfo& info);
  // wantWritable(boolean)
  void want_writable(const Napi::CallbackInfo& info);
  // close(keepProcess): closes the socket; the peer process is watched on if wanted, until it ends.
  void close(const Napi::CallbackInfo& info);
  Napi::Value peer(const Napi::CallbackInfo& info);
  // peerAlive(): whether the peer process has not ended; false also once nobody watches it.
  Napi::Value peer_alive(const Napi::CallbackInfo& info);

  void adopt(Napi::Env env, int fd);
  void emit(const char* event);
  void on_process_end();
  void stop();

  Watch* socket_ = nullptr;
  Watch* process_ = nullptr;
  Napi::FunctionReference callback_;
  Napi::ObjectReference peer_;
};

// new Listener(path, mode, backlog)
class Listener : public Napi::ObjectWrap<Listener> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Listener(const Napi::CallbackInfo& info);
  ~Listener() override;

 private:
  // start(() => void): calls back while connections wait.
  void start(const Napi::CallbackInfo& info);
  // pause(boolean): stops or goes on calling back.
  void pause(const Napi::CallbackInfo& info);
  // accept(): a Connection, or null when none waits. Throws.
  Napi::Value accept(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo& info);
  void stop();

  Watch* socket_ = nullptr;
  Napi::FunctionReference callback_;
};

// Throws a JavaScript Error with `code` and `errno` as Node's own have them.
[[noreturn]] void throw_system_error(Napi::Env env, int error, const char* call);

// Calls into JavaScript from the event loop; what it throws becomes an uncaught exception.
void call_back(const Napi::FunctionReference& function, const char* argument);

}  // namespace ebbtide::seqpacket
