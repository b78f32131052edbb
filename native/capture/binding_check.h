// What JavaScript sees of kernel_features.h and attached.h.
#pragma once

#include <napi.h>

namespace ebbtide::capture {

void defineCheck(Napi::Env env, Napi::Object exports);

}  // namespace ebbtide::capture
