// SOCK_SEQPACKET unix sockets with descriptors in messages, for Node: which has none.
#include "handles.h"
#include "unix_socket.h"

namespace ebbtide::seqpacket {
namespace {

Napi::Object init(Napi::Env env, Napi::Object exports) {
  const auto connection = Connection::define(env);
  auto* data = new AddonData{Napi::Persistent(connection)};
  env.SetInstanceData<AddonData>(data);
  exports.Set("Connection", connection);
  exports.Set("Listener", Listener::define(env));
  exports.Set("maxMessage", Napi::Number::New(env, kMaxMessage));
  return exports;
}

}  // namespace
}  // namespace ebbtide::seqpacket

static Napi::Object init_module(Napi::Env env, Napi::Object exports) {
  return ebbtide::seqpacket::init(env, exports);
}
NODE_API_MODULE(NODE_GYP_MODULE_NAME, init_module)
