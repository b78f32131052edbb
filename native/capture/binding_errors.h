// How C++ errors become JavaScript's.
#pragma once

#include <napi.h>

#include "error.h"

namespace ebbtide::capture {

// The one boundary at which C++ errors become JavaScript's: Error with `errno` and `log`.
template <typename Function>
auto guarded(Napi::Env env, Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const CaptureError& error) {
    Napi::Error thrown = Napi::Error::New(env, error.what());
    thrown.Set("errno", Napi::Number::New(env, error.number));
    thrown.Set("log", Napi::String::New(env, error.log));
    throw thrown;
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(env, error.what());
  }
}

}  // namespace ebbtide::capture
