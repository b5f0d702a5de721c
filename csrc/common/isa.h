// The instruction sets that every *_cpu.cpp is compiled for, each in a namespace of its own, and the choice of one.
#pragma once

// kernel-builder (build.toml) names the build, whose ops are in a namespace of that name, and compiles a file once and
// without options of its own: for the plain instruction set.
#if defined(TORCH_EXTENSION_NAME)
#define BCM_LIBRARY TORCH_EXTENSION_NAME
#define BCM_ISA plain
#if defined(CUDA_KERNEL)
#define BCMFNET_WITH_CUDA 1
#define BCMFNET_CUDA "as kernel-builder has it"
#endif
#elif defined(__x86_64__)
#define BCM_X86_ISAS
#endif

namespace bcmfnet {

enum class Isa { kPlain, kV3, kV4, kAmx };

// The best of this processor's instruction sets, or a lower one that BCMFNET_CPU_LEVEL (plain, v3, v4, amx) names.
// kAmx is kV4 with the matrix unit and its type, which some kernels use.
Isa cpu_isa();

#if defined(BCM_X86_ISAS)
#define BCM_DECLARE(declaration) \
  namespace plain {              \
  declaration;                   \
  }                              \
  namespace v3 {                 \
  declaration;                   \
  }                              \
  namespace v4 {                 \
  declaration;                   \
  }
#define BCM_CHOOSE(function) \
  (cpu_isa() >= Isa::kV4 ? v4::function : cpu_isa() == Isa::kV3 ? v3::function : plain::function)
#else
#define BCM_DECLARE(declaration) \
  namespace plain {              \
  declaration;                   \
  }
#define BCM_CHOOSE(function) plain::function
#endif

}  // namespace bcmfnet
