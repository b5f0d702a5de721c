// Runs one of faults.cu's reads, shifted by so many elements, for a test under sanitizers.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
int run_read_global(const float* in, float* out, int shift);
int run_read_static(const float* in, float* out, int shift);
int run_read_dynamic(const float* in, float* out, int shift);
int run_read_misaligned(const float* in, float* out, int shift);
}

int main(int, char** arguments) {
  const char* which = arguments[1];
  const auto run = !std::strcmp(which, "global")    ? run_read_global
                   : !std::strcmp(which, "static")  ? run_read_static
                   : !std::strcmp(which, "dynamic") ? run_read_dynamic
                                                    : run_read_misaligned;
  std::vector<float> in(128, 3), out(128);
  if (run(in.data(), out.data(), std::atoi(arguments[2])) != 0) return 2;
  std::printf("%g\n", out[0]);
}
