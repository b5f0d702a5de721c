// How a CPU kernel, which includes no torch header, divides its tasks among torch's threads.
#pragma once

#include <cstdint>

namespace bcmfnet {

// Runs run(body, begin, end, scratch) over ranges of [0, tasks). `work` is the number of elementary steps of a task;
// each range has `bytes` of scratch memory of its own.
using RunRange = void (*)(const void* body, int64_t begin, int64_t end, void* scratch);
using Parallel = void (*)(int64_t tasks, int64_t work, int64_t bytes, RunRange run, const void* body);

// Calls body(begin, end, scratch) in the same way.
template <typename Body>
static void parallel_tasks(Parallel parallel, int64_t tasks, int64_t work, int64_t bytes, const Body& body) {
  const auto run = [](const void* context, int64_t begin, int64_t end, void* scratch) {
    (*static_cast<const Body*>(context))(begin, end, scratch);
  };
  parallel(tasks, work, bytes, run, &body);
}

}  // namespace bcmfnet
