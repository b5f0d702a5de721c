// A fiber: a function on a stack of its own, which the caller enters and which leaves until it is entered again.
#pragma once

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstddef>
#include <new>

namespace cuda_on_cpu {

#ifdef __x86_64__

// Saves what the calling convention keeps over a call, and returns on the other stack.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .text
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

struct Context {
  void* stack_pointer;

  void start(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry would return to: aligns the stack, and ends a backtrace
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  void enter_from(Context& from) { cuda_on_cpu_switch(&from.stack_pointer, stack_pointer); }
};

#else  // two system calls a switch

struct Context {
  ucontext_t context;

  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void enter_from(Context& from) { swapcontext(&from.context, &context); }
};

#endif

#ifndef __SANITIZE_ADDRESS__
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

class Fiber {
 public:
  Fiber() : pages_(mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (pages_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(pages_, kGuard, PROT_NONE);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    unmark();
    munmap(pages_, kGuard + kStack);
  }

  void start(void (*entry)()) {
    unmark();
    inside_.start(stack(), kStack, entry);
  }

  void enter() {
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack(), kStack);
    inside_.enter_from(outside_);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  // What `entry` calls first.
  void entered() { __sanitizer_finish_switch_fiber(nullptr, &outside_stack_, &outside_bytes_); }

  void leave() {
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, outside_stack_, outside_bytes_);
    outside_.enter_from(inside_);
    __sanitizer_finish_switch_fiber(fake_stack, &outside_stack_, &outside_bytes_);
  }

  // What `entry` calls last.
  void leave_for_good() {
    __sanitizer_start_switch_fiber(nullptr, outside_stack_, outside_bytes_);
    outside_.enter_from(inside_);
  }

 private:
  static constexpr size_t kStack = 128 << 10, kGuard = 64 << 10;

  char* stack() const { return static_cast<char*>(pages_) + kGuard; }
  void unmark() { __asan_unpoison_memory_region(stack(), kStack); }  // of a function that was left for good

  void* pages_;
  Context inside_, outside_;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
};

}  // namespace cuda_on_cpu
