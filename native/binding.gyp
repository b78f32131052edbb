# Three addons, each buildable alone: node-gyp -C native build capture|engine|seqpacket; and ebbtide-boot-guard, a program
# that runs on hosts where nothing of ours is installed, so it is linked statically, to libc too.
# (after `configure`, which also finds new .cc files). A folder without sources makes an empty target.
# TLS: OpenSSL's headers come from nodedir and its symbols from the node executable, never from -lssl.
{
  'target_defaults': {
    'include_dirs': ["<!@(node -p \"require('node-addon-api').include\")"],
    'defines': ['NAPI_VERSION=9', 'NAPI_CPP_EXCEPTIONS', 'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS', '_GNU_SOURCE'],
    'cflags!': ['-O3', '-Wno-unused-parameter'],
    'cflags': ['-O2', '-g', '-fvisibility=hidden', '-fstack-protector-strong', '-Wall', '-Wextra', '-Werror',
               # The same bytes (the build id is made of debugging sections, too) wherever the checkout is.
               '-ffile-prefix-map=<!(cd .. && pwd -P)=.'],
    'cflags_cc!': ['-std=gnu++17', '-std=gnu++20', '-fno-exceptions', '-fno-rtti'],
    'cflags_cc': ['-std=c++20', '-fvisibility-inlines-hidden'],
    'configurations': {
      # Fortify needs optimisation, so it is a matter of Release only.
      'Release': {'defines': ['_FORTIFY_SOURCE=2'], 'cflags!': ['-O3'], 'cflags': ['-O2']},
    },
    'ldflags': ['-Wl,-z,now,-z,relro', '-Wl,-z,nodelete', '-Wl,--exclude-libs,ALL'],
  },
  'targets': [
    {
      'target_name': 'capture',
      'type': '<!(ls capture/*.cc >/dev/null 2>&1 && echo loadable_module || echo none)',
      'product_extension': 'node',
      'sources': ['<!@(ls capture/*.cc 2>/dev/null || true)'],
      # Skeletons that `make -C bpf` wrote, and the structs shared with the BPF programs.
      'include_dirs': ['../bpf/build', '../bpf'],
      'libraries': ['-lbpf'],
    },
    {
      'target_name': 'ebbtide-boot-guard',
      'type': '<!(ls capture/*.cc >/dev/null 2>&1 && echo executable || echo none)',
      # All of capture but its face for JavaScript.
      'sources': ['<!@(ls boot-guard/*.cc capture/*.cc | grep -v /binding.cc || true)'],
      'include_dirs': ['../bpf/build', '../bpf', 'capture'],
      'ldflags!': ['-rdynamic', '-Wl,-z,nodelete'],
      'ldflags': ['-static', '-Wl,--gc-sections'],
      # libelf is built with zstd by newer distributions.
      'libraries': ['-lbpf', '-lelf', '-lz', "<!@(ls /usr/lib/*/libzstd.a >/dev/null 2>&1 && echo -lzstd || true)", '-pthread'],
    },
    {
      'target_name': 'engine',
      'type': '<!(ls engine/*.cc >/dev/null 2>&1 && echo loadable_module || echo none)',
      'product_extension': 'node',
      'sources': ['<!@(ls engine/*.cc 2>/dev/null || true)'],
      'libraries': ['-pthread'],
      # nghttp2's symbols come from the node executable too; only its header is Debian's.
    },
    {
      'target_name': 'seqpacket',
      'type': '<!(ls seqpacket/*.cc >/dev/null 2>&1 && echo loadable_module || echo none)',
      'product_extension': 'node',
      'sources': ['<!@(ls seqpacket/*.cc 2>/dev/null || true)'],
      'libraries': ['-pthread'],
    },
  ],
}
