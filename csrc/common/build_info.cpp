// What this library was built with, for `bcmfnet env`; read through ctypes, so that it needs no op.

extern "C" __attribute__((visibility("default"))) const char* bcmfnet_build_info() {
  return "{\"compiler\": \"" __VERSION__ "\", \"cuda\": "
#if BCMFNET_WITH_CUDA
         "true"
#else
         "false"
#endif
         "}";
}
