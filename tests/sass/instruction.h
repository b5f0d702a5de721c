// Kernels as emulator.cpp runs them: decode.cpp makes them from the listing that cubin.py writes.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sass {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;

// The rows of a warp: R0 to R254 and RZ, then UR0 to UR62 and URZ, then what is written to no register, then barriers.
enum : uint16_t { kZero = 255, kUniform = 256, kUniformZero = 319, kNowhere = 320, kBarriers = 324, kRows = 340 };

// The predicates of a warp: P0 to P6 and PT, UP0 to UP6 and UPT, and what is written to none.
enum : uint8_t { kTrue = 7, kUniformPredicates = 8, kUniformTrue = 15, kNoPredicate = 16, kPredicates = 17 };

enum class Op : uint8_t {
  kNop, kMove, kIadd3, kIadd64, kImad, kImadWide, kImadHigh, kLea, kLeaHigh, kShift, kLop3, kPlop3, kSelect, kIsetp, kIminmax,
  kIabs, kPrmt, kPopc, kFlo, kBrev, kSignExtend, kFadd, kFmul, kFfma, kFset, kFsetp, kFminmax, kFchk, kMufu,
  kFround, kFloatToInt, kIntToFloat, kFloatToFloat, kPackFloats, kHalfToFloat, kHalfAdd, kHalfMul, kHalfFma, kHalfSetp,
  kHalfMinmax, kDadd, kDmul, kDfma, kDsetp, kShuffle, kVote, kMatch, kRedux, kPredicatesToRegister,
  kRegisterToPredicates, kSpecial, kLoadConstant, kToUniform, kGlobalLoad, kGlobalStore, kGlobalAtomic, kSharedLoad,
  kSharedStore, kSharedAtomic, kSharedMatrices, kStoreMatrices, kLocalLoad, kLocalStore, kCopyToShared, kMma, kGroupMma, kBarrier, kBarrierResult,
  kBranch, kBranchIndexed, kBranchDivergent, kCall, kReturn, kExit, kReconverge, kConverge, kBreak, kMoveBarrier,
  kWarpSync, kTrap,
};

// What the issue slots are counted by.
enum class Class : uint8_t {
  kInteger, kFloat, kSpecial, kHalf, kDouble, kTensor, kGlobalLoad, kGlobalStore, kGlobalAtomic, kSharedLoad,
  kSharedStore, kSharedAtomic, kLocal, kConstant, kWarp, kBarrier, kControl, kClasses,
};
const char* name_of(Class kind);

enum class Compare : uint8_t {
  kFalse, kLt, kEq, kLe, kGt, kNe, kGe, kNum, kNan, kLtu, kEqu, kLeu, kGtu, kNeu, kGeu, kTrue,
};
enum class Combine : uint8_t { kAnd, kOr, kXor };
enum class Round : uint8_t { kNearest, kDown, kUp, kZero };
enum class Type : uint8_t { kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBF16, kF32, kF64 };
enum class Atomic : uint8_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

// A row of a warp or, from the pool, a constant; (value & keep ^ flip) + add is read.
struct Source {
  uint32_t row = kZero, high = kZero;  // high: the upper half of a pair
  uint32_t keep = kAll, flip = 0, add = 0;
  bool pool = false, modified = false;
  bool negated = false, absolute = false;  // which say the same
  uint8_t half = 0;                        // 0: both, 1: the low one twice, 2: the high one twice
};

struct PredicateSource {
  uint8_t index = kTrue;
  bool inverted = false;
};

struct Address {
  uint16_t row = kZero, uniform = kUniformZero;
  int32_t offset = 0;
  uint8_t scale = 0;  // a shift
  bool wide = false;  // the row is the low one of a pair
};

struct Instruction {
  Op op = Op::kNop;
  Class kind = Class::kControl;
  PredicateSource guard;
  bool uniform = false;  // by the uniform datapath: for all lanes at once
  uint8_t sources = 0, predicates = 0, results = 0;
  uint16_t to = kNowhere, to_high = kNowhere;
  uint8_t to_predicate[2] = {kNoPredicate, kNoPredicate};
  Source source[3];
  PredicateSource predicate[3];
  uint32_t immediate = 0;  // of logic: the table of truth; of a branch: where it leads, as an index
  Address address, second;
  uint8_t bytes = 4;  // of a memory access
  Type type = Type::kU32, from = Type::kU32;
  Compare compare = Compare::kFalse;
  Combine combine = Combine::kAnd;
  Round round = Round::kNearest;
  Atomic atomic = Atomic::kAdd;
  bool extended = false, high = false, left = false, wraps = false, ftz = false, saturates = false, brain = false;
  bool nan_to_zero = false, any = false, packed = false;  // packed: two numbers of 16 bits
  uint8_t variant = 0;  // of a few operations, see decode.cpp
  uint8_t bank = 0;
};

struct Constant {
  uint32_t row;
  uint8_t bank;  // or kImmediate
  uint32_t value;  // of an immediate, else where it lies
};
constexpr uint8_t kImmediate = 255;

struct Kernel {
  std::string name;
  unsigned registers = 0;  // of a thread
  unsigned shared = 0;     // bytes of a block, with the kilobyte that the system takes, without dynamic ones
  unsigned frame = 0;      // bytes of a thread in local memory
  bool repeats = false;    // warps may write the same values to one place, as Triton's do where a layout has copies
  struct Argument {
    unsigned offset, bytes;
  };
  std::vector<Argument> arguments;
  std::vector<Instruction> code;
  std::vector<std::string_view> text;     // as it was disassembled
  std::vector<std::string_view> sources;  // file and line
  std::vector<Constant> constants;     // rows of the pool
  std::vector<std::string> banks;      // but the first
};

// All kernels of a listing by their names; each is decoded when it is first asked for. Throws std::runtime_error where
// an instruction is not known.
class Module {
 public:
  explicit Module(std::string listing) { add(std::move(listing)); }
  void add(std::string listing, bool repeats = false);
  const Kernel& kernel(const std::string& name);
  std::string listing(const std::string& part) const;  // of the first kernel whose name has this part

 private:
  std::list<std::string> texts_;
  struct Listing {
    std::string_view text;  // in one of those
    bool repeats;
  };
  std::map<std::string, Listing> listings_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

std::string demangled(const std::string& name);

}  // namespace sass
