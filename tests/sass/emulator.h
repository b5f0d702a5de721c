// Runs the blocks of a launch, one warp instruction at a time, and counts.
//
// Blocks run one after another, and each warp runs as far as it can before the next one starts; in every second block
// the last warp comes first. Lanes of a warp diverge and converge as since Volta: a branch parts a group of lanes, and
// BSYNC, WARPSYNC and barriers alone join them; in every second block the group that jumps goes first.
//
// A launch ends with a Fault where an access is misaligned or outside of what is known to be allocated, where shared
// memory is read that was not written, or that another warp has written or reads since the last barrier, where a
// barrier is not met by all threads, and where a shuffle reads a lane that is not there.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "instruction.h"

namespace sass {

struct Size {
  unsigned x, y, z;
};
std::string text_of(Size size);

struct Launch {
  Size grid, block;
  unsigned shared = 0;  // bytes of dynamic shared memory
  std::string parameters;
};

// What a kernel may touch: begin and end of each allocation.
class Allocations {
 public:
  void add(uint64_t begin, uint64_t bytes);
  void clear() { ranges_.clear(); }
  struct Range {
    uint64_t begin, end;
  };
  // That which holds so many bytes, or else the nearest one; null where there is none at all.
  const Range* find(uint64_t address, uint64_t bytes) const;

 private:
  std::vector<Range> ranges_;
};

// Of one kernel, over any number of launches.
struct Counts {
  uint64_t launches = 0, blocks = 0, warps = 0;
  unsigned threads = 0, shared = 0;                   // a block, of the last launch
  std::vector<uint64_t> executed, requests, sectors;  // of each instruction: warps, and accesses to global memory
  uint64_t sectors_read = 0, sectors_written = 0;     // of 32 bytes, each counted once a launch
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How far off special functions are: not beyond float32, or by the most that the PTX ISA allows, up, down or by turns.
enum class Error : int { kNone, kUp, kDown, kTurns };
void set_error(Error error);

// Throws Fault. Counts sectors if `counts_sectors`, instructions always.
void run(
    const Kernel& kernel, const Launch& launch, const Allocations& allocations, bool counts_sectors, Counts& counts);

}  // namespace sass
