#include <cstring>
#include <string>

#include "handles.h"

namespace ebbtide::seqpacket {

void throw_system_error(Napi::Env env, int error, const char* call) {
  const char* name = uv_err_name(-error);
  auto exception = Napi::Error::New(env, std::string(call) + ": " + name + ", " + uv_strerror(-error));
  exception.Set("code", Napi::String::New(env, name));
  exception.Set("errno", Napi::Number::New(env, -error));
  exception.Set("syscall", Napi::String::New(env, call));
  throw exception;
}

void call_back(const Napi::FunctionReference& function, const char* argument) {
  if (function.IsEmpty()) return;
  const Napi::Env env = function.Env();
  const Napi::HandleScope scope(env);
  try {
    function.MakeCallback(env.Global(), {Napi::String::New(env, argument)});
  } catch (const Napi::Error& exception) {
    napi_fatal_exception(env, exception.Value());
  }
}

}  // namespace ebbtide::seqpacket
