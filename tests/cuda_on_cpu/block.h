// The threads of a block, as fibers, and how they wait for each other.
#pragma once

#include <deque>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace cuda_on_cpu {

struct Site {
  const char* call;
  uint64_t mask;
  Here here;

  // Equal literals of one source file have one address.
  bool operator==(const Site& other) const {
    return call == other.call && mask == other.mask && here.file == other.here.file && here.line == other.here.line;
  }
};

struct Thread {
  enum State { kReady, kWaiting, kExited };

  uint3 index;
  State state;
  Site site;  // where it waits, and what it brought
  uint64_t value;
  Fiber* fiber;
};

class Block {
 public:
  Block(dim3 size, const std::function<void()>& body) : body_(body), size_(size.x * size.y * size.z) {
    threads_.resize((size_ + 31) / 32 * 32, {{}, Thread::kExited, {}, 0, nullptr});
    values_.resize(threads_.size());
    for (unsigned i = 0; i < size_; ++i) threads_[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
  }

  // Takes back the stacks of threads that could not go on.
  ~Block() {
    for (const Thread& thread : threads_) {
      if (thread.fiber != nullptr && thread.state != Thread::kExited) idle_.push_back(thread.fiber);
    }
  }
  Block(const Block&) = delete;

  static inline Block* running = nullptr;

  // Throws std::runtime_error where no thread can go on.
  void run(bool forward) {
    for (unsigned i = 0; i < size_; ++i) threads_[i].state = Thread::kReady, threads_[i].fiber = nullptr;
    live_ = size_;
    running = this;
    for (;;) {
      for (unsigned i = 0; i < threads_.size(); i += 32) run_warp(forward ? i : threads_.size() - 32 - i, forward);
      if (live_ == 0) return;
      release_block();
    }
  }

  const uint64_t* meet(const Site& site, uint64_t value) {
    Thread& thread = *thread_;
    thread.site = site;
    thread.value = value;
    thread.state = Thread::kWaiting;
    thread.fiber->leave();
    return site.mask == kWholeBlock ? votes_ : &values_[(&thread - threads_.data()) / 32 * 32];
  }

 private:
  void run_warp(unsigned first, bool forward) {
    do {
      for (unsigned i = 0; i < 32; ++i) {
        lane = forward ? i : 31 - i;
        if (threads_[first + lane].state == Thread::kReady) enter(threads_[first + lane]);
      }
    } while (release_lanes(first));
  }

  void enter(Thread& thread) {
    thread_ = &thread;
    threadIdx = thread.index;
    if (thread.fiber == nullptr) start(thread);
    thread.fiber->enter();
    if (thread.state != Thread::kExited) return;
    idle_.push_back(thread.fiber);  // the next thread to start finds this stack in the cache
    --live_;
  }

  void start(Thread& thread) {
    if (idle_.empty()) idle_.push_back(&fibers_.emplace_back());
    thread.fiber = idle_.back();
    idle_.pop_back();
    thread.fiber->start([] { running->run_thread(); });
  }

  void run_thread() {
    Thread& thread = *thread_;
    thread.fiber->entered();
    body_();
    thread.state = Thread::kExited;
    thread.fiber->leave_for_good();
  }

  // Lets those lanes of a warp go on whose whole mask has made the same call.
  bool release_lanes(unsigned first) {
    bool released = false;
    for (unsigned i = first; i < first + 32; ++i) {
      const Site site = threads_[i].site;
      if (threads_[i].state != Thread::kWaiting || site.mask == kWholeBlock) continue;
      if (!(site.mask >> i % 32 & 1) || !all_wait(first, site)) continue;
      for (uint64_t rest = site.mask; rest != 0; rest &= rest - 1) {
        const unsigned member = first + __builtin_ctzll(rest);
        values_[member] = threads_[member].value;
        threads_[member].state = Thread::kReady;
      }
      released = true;
    }
    return released;
  }

  bool all_wait(unsigned first, const Site& site) const {
    for (uint64_t rest = site.mask; rest != 0; rest &= rest - 1) {
      const Thread& thread = threads_[first + __builtin_ctzll(rest)];
      if (thread.state != Thread::kWaiting || !(thread.site == site)) return false;
    }
    return true;
  }

  // Lets all threads go on, who must all have reached one barrier of the block.
  void release_block() {
    const Site* site = nullptr;
    votes_[0] = 0, votes_[1] = live_;
    for (Thread& thread : threads_) {
      if (thread.state == Thread::kExited) continue;
      if (site == nullptr) site = &thread.site;
      if (site->mask != kWholeBlock || !(thread.site == *site)) throw std::runtime_error(describe());
      votes_[0] += thread.value != 0;
    }
    for (Thread& thread : threads_) {
      if (thread.state == Thread::kWaiting) thread.state = Thread::kReady;
    }
  }

  // Why no thread can go on, and what the threads wait at, in groups.
  std::string describe() const {
    std::string reason = "divergent barrier", groups;
    for (unsigned first = 0, next; first < size_; first = next) {
      for (next = first + 1; next < size_ && alike(threads_[first], threads_[next]);) ++next;
      groups += (first ? "; threads " : ": threads ") + std::to_string(first) + "-" + std::to_string(next - 1) + " ";
      groups += describe(threads_[first]);
      if (const char* fault = fault_of_mask(first)) reason = fault;
    }
    return reason + groups;
  }

  static std::string describe(const Thread& thread) {
    if (thread.state == Thread::kExited) return "have exited";
    const Site& site = thread.site;
    std::ostringstream text;
    text << "wait at " << site.call;
    if (site.mask != kWholeBlock) text << " of mask 0x" << std::hex << std::setfill('0') << std::setw(8) << site.mask;
    text << " (" << site.here.file << ":" << std::dec << site.here.line << ")";
    return text.str();
  }

  static bool alike(const Thread& a, const Thread& b) {
    return a.state == b.state && (a.state == Thread::kExited || a.site == b.site);
  }

  const char* fault_of_mask(unsigned number) const {
    const Thread& thread = threads_[number];
    if (thread.state == Thread::kExited || thread.site.mask == kWholeBlock) return nullptr;
    if (!(thread.site.mask >> number % 32 & 1)) return "a mask does not name its caller";
    for (uint64_t rest = thread.site.mask; rest != 0; rest &= rest - 1) {
      const unsigned member = number / 32 * 32 + __builtin_ctzll(rest);
      if (threads_[member].state == Thread::kExited) return "a mask names lanes that have exited or never were";
    }
    return nullptr;
  }

  const std::function<void()>& body_;
  const unsigned size_;
  std::vector<Thread> threads_;   // to a multiple of 32: absent lanes count as exited
  std::vector<uint64_t> values_;  // of each thread, at its last call within a warp
  uint64_t votes_[2];             // at the block's last barrier: values that were not 0, and threads
  unsigned live_ = 0;
  Thread* thread_ = nullptr;  // the running one

  // Stacks outlive a launch: to map and to touch those of a block takes longer than most launches of a test.
  static inline std::deque<Fiber> fibers_;
  static inline std::vector<Fiber*> idle_;
};

}  // namespace cuda_on_cpu
