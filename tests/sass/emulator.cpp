#include "emulator.h"

#include <immintrin.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <sstream>

namespace sass {
namespace {

#define EACH for (int l = 0; l < kLanes; ++l)
#define EACH_OF(mask) for (uint32_t rest = (mask), l; rest != 0 && (l = __builtin_ctz(rest), true); rest &= rest - 1)

struct alignas(64) Row {
  uint32_t v[kLanes];

  const float* floats() const { return reinterpret_cast<const float*>(v); }
  float* floats() { return reinterpret_cast<float*>(v); }
};

constexpr uint32_t kReserved = 1024;  // bytes at the beginning of shared memory
constexpr uint32_t kNan = 0x7fffffff;

double double_of(uint32_t low, uint32_t high) {
  const uint64_t bits = uint64_t{high} << 32 | low;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return value != value ? 0x7fffffffffffffffull : bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? kNan : bits;
}
float float_of_half(uint16_t half) { return _cvtsh_ss(half); }
uint16_t half_of(float value) {
  return value != value ? 0x7fff : _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
uint16_t brain_of(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Each 0 or all ones.
uint32_t mask_of(const Row& row) {
  uint32_t mask = 0;
  for (int part = 0; part < 4; ++part) {
    const __m256 lanes = _mm256_load_ps(row.floats() + 8 * part);
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(lanes)) << 8 * part;
  }
  return mask;
}
template <typename Test>
inline uint32_t lanes_where(Test test) {
  Row row;
  EACH row.v[l] = test(l) ? kAll : 0;
  return mask_of(row);
}

void flush(uint32_t* bits) { EACH bits[l] &= (bits[l] & 0x7f800000) == 0 ? 0x80000000 : kAll; }

// Runs what reads and writes rows, rounding in another direction than to the nearest.
template <typename Run>
[[gnu::noinline]] void rounding(Round round, Run run) {
  constexpr int modes[] = {FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO};
  if (round == Round::kNearest) return run();
  const int before = std::fegetround();
  std::fesetround(modes[int(round)]);
  asm volatile("" ::: "memory");
  run();
  asm volatile("" ::: "memory");
  std::fesetround(before);
}

template <typename T>
T to_integer(T value, Round round) {
  switch (round) {
    case Round::kDown: return std::floor(value);
    case Round::kUp: return std::ceil(value);
    case Round::kZero: return std::trunc(value);
    default: return std::nearbyint(value);
  }
}
Error wanted_error = Error::kNone;

// The special function unit: subnormal numbers are 0 there. Its last bits are not ours; they may be off as far as the PTX
// ISA says (9.7.3: rcp.approx.ftz, rsqrt.approx.ftz, lg2.approx.ftz, ex2.approx.ftz).
float special(uint8_t function, float x) {
  const auto flushed = [](float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; };
  x = flushed(x);
  const bool up = wanted_error == Error::kTurns ? (bits_of(x) >> 3 & 1) != 0 : wanted_error == Error::kUp;
  const double sign = wanted_error == Error::kNone ? 0 : up ? 1 : -1;
  const auto off = [&](double value, double relative) { return flushed(static_cast<float>(value * (1 + sign * relative))); };
  switch (function) {
    case 0: {  // to a unit in the last place: the nearest float above or below, on which divisions of integers rely
      const float nearest = 1 / x;
      const double beyond = std::fma(static_cast<double>(nearest), x, -1.0) * (x > 0 ? 1 : -1);  // over the quotient
      if (sign == 0 || beyond == 0 || !std::isfinite(nearest) || up == (beyond > 0)) return flushed(nearest);
      return flushed(std::nextafter(nearest, up ? HUGE_VALF : -HUGE_VALF));
    }
    case 1: return off(1 / std::sqrt(static_cast<double>(x)), 0x1p-22);
    case 2: {
      if (sign == 0 || !(x > 0)) return std::log2(x);
      const double exact = std::log2(static_cast<double>(x));
      return x > 0.5f && x < 2 ? static_cast<float>(exact + sign * 0x1p-22) : off(exact, 0x1p-22);
    }
    case 3: return sign == 0 ? flushed(std::exp2(x)) : off(std::exp2(static_cast<double>(x)), 0x1p-22);
    case 4: return std::sin(x);
    case 5: return std::cos(x);
    case 6: return std::sqrt(x);
    default: return std::tanh(x);
  }
}

// Whether a division needs the slow way: where an exponent is near the end of its range, or the quotient's is.
bool divides_slowly(float a, float b) {
  const int of_a = bits_of(a) >> 23 & 255, of_b = bits_of(b) >> 23 & 255;
  if (of_a == 255 || of_b == 255 || of_b <= 1 || of_b >= 252) return true;
  return a != 0 && (of_a < 26 || of_a - of_b >= 126 || of_a - of_b <= -124);
}

enum class State : uint8_t { kReady, kAtConverge, kAtWarpSync, kAtBarrier };

// Lanes that run together.
struct Group {
  uint32_t mask, pc;
  State state = State::kReady;
  uint32_t waits_for = 0;  // a convergence barrier, or the mask of a WARPSYNC
};

struct Warp {
  std::vector<Group> groups;
  uint32_t alive = 0;
  uint32_t predicates[kPredicates];
  Row rows[kRows];
  // The lanes whose value, of a register or a predicate, follows from shared memory that was not written.
  bool has_unwritten = false;
  uint32_t unwritten[kRows], unwritten_predicates[kPredicates];
};

class Machine {
 public:
  Machine(
      const Kernel& kernel, const Launch& launch, const Allocations& allocations, bool counts_sectors, Counts& counts)
      : kernel_(kernel), launch_(launch), allocations_(allocations), counts_sectors_(counts_sectors), counts_(counts),
        threads_(launch.block.x * launch.block.y * launch.block.z), warps_((threads_ + 31) / 32),
        shared_(kernel.shared + launch.shared), writers_(shared_.size()), readers_(shared_.size()),
        local_(warps_.size() * kLanes * kernel.frame), hints_(kernel.code.size()) {
    lay_out_constants();
  }

  void run() {
    bool forward = true;
    ++counts_.launches;
    for (block_.z = 0; block_.z < launch_.grid.z; ++block_.z)
      for (block_.y = 0; block_.y < launch_.grid.y; ++block_.y)
        for (block_.x = 0; block_.x < launch_.grid.x; ++block_.x, forward = !forward) run_block(forward);
    for (const auto& [page, sectors] : pages_) {
      for (const uint64_t bits : sectors.read) counts_.sectors_read += __builtin_popcountll(bits);
      for (const uint64_t bits : sectors.written) counts_.sectors_written += __builtin_popcountll(bits);
    }
  }

 private:
  void lay_out_constants() {
    std::string first(0x210, '\0');
    const uint32_t head[] = {launch_.block.x, launch_.block.y, launch_.block.z, launch_.grid.x, launch_.grid.y,
                             launch_.grid.z};
    std::memcpy(first.data(), head, sizeof(head));
    std::memcpy(first.data() + 0x28, &kernel_.frame, 4);
    first += launch_.parameters;
    banks_ = kernel_.banks;
    banks_[0] = first;
    pool_.resize(kernel_.constants.size());
    for (const Constant& constant : kernel_.constants) {
      const uint32_t value =
          constant.bank == kImmediate ? constant.value : constant_at(constant.bank, constant.value, 4, false);
      EACH pool_[constant.row].v[l] = value;
    }
  }
  uint32_t constant_at(uint8_t bank, uint32_t at, unsigned bytes, bool must_exist) const {
    const std::string& values = banks_[bank];
    uint32_t value = 0;
    if (at + bytes <= values.size()) {
      std::memcpy(&value, values.data() + at, bytes);
    } else if (must_exist) {
      throw Fault("reads " + std::to_string(at + bytes) + " bytes into the " + std::to_string(values.size()) +
                  " bytes of a constant bank");
    }
    return value;
  }

  void run_block(bool forward) {
    forward_ = forward;
    epoch_ = 1, barrier_ones_ = barrier_threads_ = 0;
    std::memset(shared_.data(), 0xff, shared_.size());
    std::fill(writers_.begin(), writers_.end(), 0);
    std::fill(readers_.begin(), readers_.end(), 0);
    for (unsigned i = 0; i < warps_.size(); ++i) start(warps_[i], std::min(threads_ - 32 * i, 32u));
    counts_.blocks += 1, counts_.warps += warps_.size();
    for (;;) {
      for (unsigned i = 0; i < warps_.size(); ++i) {
        number_ = forward ? i : static_cast<unsigned>(warps_.size()) - 1 - i;
        run_warp(warps_[number_]);
      }
      if (!release_block()) return;
    }
  }

  void start(Warp& warp, unsigned lanes) {
    warp.alive = lanes == 32 ? kAll : (1u << lanes) - 1;
    warp.groups.assign(1, Group{warp.alive, 0});
    std::memset(warp.rows, 0, sizeof(warp.rows));
    std::memset(warp.predicates, 0, sizeof(warp.predicates));
    warp.predicates[kTrue] = warp.predicates[kUniformTrue] = kAll;
    warp.has_unwritten = false;
    std::memset(warp.unwritten, 0, sizeof(warp.unwritten));
    std::memset(warp.unwritten_predicates, 0, sizeof(warp.unwritten_predicates));
  }

  // Lets all warps go on, which must all have met at one barrier; false where there are none left.
  bool release_block() {
    uint32_t pc = kAll;
    bool any = false;
    for (unsigned i = 0; i < warps_.size(); ++i) {
      Warp& warp = warps_[i];
      if (warp.alive == 0) continue;
      if (warp.groups.size() != 1 || warp.groups[0].state != State::kAtBarrier || (any && warp.groups[0].pc != pc))
        throw Fault(where() + ": divergent barrier: " + describe());
      pc = warp.groups[0].pc, any = true;
    }
    if (!any) return false;
    for (Warp& warp : warps_)
      for (Group& group : warp.groups) group.state = State::kReady, ++group.pc;
    results_ones_ = barrier_ones_, results_threads_ = barrier_threads_, results_kind_ = reduction_;
    barrier_ones_ = barrier_threads_ = 0;
    ++epoch_;
    return true;
  }

  std::string where() const { return kernel_.name + ", block " + text_of(block_); }

  std::string at(uint32_t pc) const {
    char address[16];
    std::snprintf(address, sizeof(address), "/*%04x*/ ", pc * 16);
    return address + std::string(kernel_.text[pc]) + " (" + std::string(kernel_.sources[pc]) + ")";
  }

  // What the threads wait at.
  std::string describe() const {
    std::ostringstream text;
    for (unsigned i = 0; i < warps_.size(); ++i) {
      text << (i ? "; " : "") << "warp " << i;
      if (warps_[i].alive == 0) text << " has exited";
      for (const Group& group : warps_[i].groups)
        text << (&group == &warps_[i].groups[0] ? " " : ", ") << "lanes 0x" << std::hex << group.mask << std::dec
             << " wait at " << at(group.pc);
    }
    return text.str();
  }

  void run_warp(Warp& warp) {
    warp_ = &warp;
    base_[0] = warp.rows[0].v, base_[1] = pool_.empty() ? nullptr : pool_[0].v;
    do {
      for (size_t i; (i = next_ready(warp)) < warp.groups.size();) {
        const Group group = warp.groups[i];
        warp.groups.erase(warp.groups.begin() + i);
        run_group(group);
      }
    } while (release_lanes(warp));
  }
  static size_t next_ready(const Warp& warp) {
    size_t i = warp.groups.size();
    while (i > 0)
      if (warp.groups[--i].state == State::kReady) return i;
    return warp.groups.size();
  }

  // Joins groups that wait for each other, and lets them go on unless they wait for the block.
  bool release_lanes(Warp& warp) {
    for (size_t i = 0; i < warp.groups.size(); ++i) {
      const Group group = warp.groups[i];
      const auto meets = [&](const Group& other) {
        return other.state == group.state && other.pc == group.pc && other.waits_for == group.waits_for;
      };
      uint32_t here = 0;
      for (const Group& other : warp.groups) here |= meets(other) ? other.mask : 0;
      uint32_t wanted = here;
      if (group.state == State::kAtConverge)
        wanted = warp.rows[kBarriers + group.waits_for].v[__builtin_ctz(group.mask)] & warp.alive;
      if (group.state == State::kAtWarpSync) {
        wanted = group.waits_for;
        if (wanted & ~warp.alive)
          throw Fault(where() + ", warp " + std::to_string(number_) + ", " + at(group.pc) +
                      ": a mask names lanes that have exited or never were");
      }
      if (group.state == State::kAtBarrier && here == group.mask) continue;
      if ((here & wanted) != wanted) continue;
      warp.groups.erase(std::remove_if(warp.groups.begin(), warp.groups.end(), meets), warp.groups.end());
      Group joined = group;
      joined.mask = here;
      if (group.state != State::kAtBarrier) joined.state = State::kReady, ++joined.pc;
      warp.groups.push_back(joined);
      return true;
    }
    return false;
  }

  const uint32_t* read(const Source& source, Row& room) const {
    const uint32_t* from = base_[source.pool] + size_t{source.row} * kLanes;
    if (!source.modified) return from;
    EACH room.v[l] = ((from[l] & source.keep) ^ source.flip) + source.add;
    return room.v;
  }
  const uint32_t* as_stored(const Source& source) const { return base_[source.pool] + size_t{source.row} * kLanes; }
  const uint32_t* read_high(const Source& source) const { return base_[source.pool] + size_t{source.high} * kLanes; }
  double read_double(const Source& source, int l) const {
    const double value = double_of(
        (base_[source.pool] + size_t{source.row} * kLanes)[l], (base_[source.pool] + size_t{source.high} * kLanes)[l]);
    const double magnitude = source.absolute ? std::fabs(value) : value;
    return source.negated ? -magnitude : magnitude;
  }
  uint64_t read_wide(const Source& source, int l) const {
    return uint64_t{read_high(source)[l]} << 32 | (base_[source.pool] + size_t{source.row} * kLanes)[l];
  }
  uint32_t read(const PredicateSource& source) const {
    return warp_->predicates[source.index] ^ (source.inverted ? kAll : 0);
  }
  void write(uint16_t row, const Row& from, uint32_t mask) {
    uint32_t* to = warp_->rows[row].v;
    if (mask == kAll) {
      std::memcpy(to, from.v, sizeof(Row));
    } else {
      EACH to[l] = mask >> l & 1 ? from.v[l] : to[l];
    }
  }
  void write_predicate(uint8_t index, uint32_t value, uint32_t mask) {
    uint32_t& to = warp_->predicates[index];
    to = (to & ~mask) | (value & mask);
  }
  void write_float(const Instruction& i, Row& result, uint32_t mask) {
    float* const x = result.floats();
    if (i.saturates) EACH x[l] = x[l] > 0 ? (x[l] < 1 ? x[l] : 1.0f) : 0.0f;
    EACH result.v[l] = x[l] != x[l] ? kNan : result.v[l];
    if (i.ftz) flush(result.v);
    write(i.to, result, mask);
  }

  [[noreturn]] void fail(int lane, const std::string& reason) const {
    throw Fault(where() + ", warp " + std::to_string(number_) + ", lane " + std::to_string(lane) + ", " + at(pc_) +
                ": " + reason);
  }

  void run_group(Group group) {
    uint32_t pc = group.pc, active = group.mask;
    Warp& warp = *warp_;
    const Instruction* const code = kernel_.code.data();
    uint64_t* const executed = counts_.executed.data();
    Row room[3], result, upper;
    const uint32_t *a = nullptr, *b = nullptr, *c = nullptr;
    const auto leave = [&](State state, uint32_t mask, uint32_t waits_for) {
      warp.groups.push_back({mask, pc, state, waits_for});
    };
    for (;; ++pc) {
      if (pc >= kernel_.code.size()) {
        pc_ = pc - 1;
        fail(__builtin_ctz(active), "runs off the end of the code");
      }
      const Instruction& i = code[pc];
      pc_ = pc;
      ++executed[pc];
      uint32_t lanes = active & read(i.guard);
      if (i.kind == Class::kControl)
        for (int p = 0; p < i.predicates; ++p) lanes &= read(i.predicate[p]);
      const uint32_t mask = i.uniform ? (lanes ? kAll : 0) : lanes;
      if (warp.has_unwritten) [[unlikely]] follow_unwritten(i, active, mask);
      // What parts a group or ends it comes first, then what does nothing without a lane.
      switch (i.op) {
        case Op::kBranch:
          if (!jump(pc, active, lanes, i.immediate)) return;
          continue;
        case Op::kBranchDivergent: {
          a = read(i.source[0], room[0]);
          const uint32_t jumps = (active ^ a[0]) != 0 ? lanes : 0;
          if (!jump(pc, active, jumps, i.immediate)) return;
          continue;
        }
        case Op::kBranchIndexed:
        case Op::kReturn: {
          if (lanes != active) warp.groups.push_back({active & ~lanes, pc + 1});
          a = read(i.source[0], room[0]);
          const uint32_t offset = i.immediate + (i.op == Op::kBranchIndexed ? (pc + 1) * 16 : 0);
          for (uint32_t left = lanes; left != 0;) {
            const uint32_t where_to = a[__builtin_ctz(left)];
            const uint32_t together = left & lanes_where([&](int l) { return a[l] == where_to; });
            warp.groups.push_back({together, (where_to + offset) / 16});
            left &= ~together;
          }
          return;
        }
        case Op::kExit:
          warp.alive &= ~lanes;
          active &= ~lanes;
          if (active == 0) return;
          continue;
        case Op::kReconverge:
          if (lanes != 0) EACH if (active >> l & 1) warp.rows[kBarriers + i.bank].v[l] = active;
          continue;
        case Op::kConverge: {
          if (lanes == 0) continue;
          if (lanes != active) warp.groups.push_back({active & ~lanes, pc + 1});
          active = lanes;
          const uint32_t wanted = warp.rows[kBarriers + i.bank].v[__builtin_ctz(active)] & warp.alive;
          if ((wanted & ~active) == 0) continue;
          return leave(State::kAtConverge, active, i.bank);
        }
        case Op::kBreak:
          EACH warp.rows[kBarriers + i.bank].v[l] &= ~lanes;
          continue;
        case Op::kWarpSync: {
          if (i.variant == 1) {
            if (lanes == warp.alive) continue;
            return leave(State::kAtWarpSync, active, warp.alive);
          }
          a = read(i.source[0], room[0]);
          if (lanes != active) warp.groups.push_back({active & ~lanes, pc + 1});
          for (uint32_t left = lanes; left != 0;) {
            const uint32_t wanted = a[__builtin_ctz(left)];
            const uint32_t together = left & lanes_where([&](int l) { return a[l] == wanted; });
            EACH_OF(together & ~wanted) fail(l, "a mask does not name its caller");
            if (wanted & ~warp.alive)
              fail(__builtin_ctz(together), "a mask names lanes that have exited or never were");
            left &= ~together;
            if (together == wanted && left == 0 && together == lanes) {
              active = together;
              break;
            }
            leave(State::kAtWarpSync, together, wanted);
            if (left == 0) return;
          }
          continue;
        }
        case Op::kBarrier:
          if (lanes == 0) continue;
          if (lanes != active) warp.groups.push_back({active & ~lanes, pc + 1});
          if (i.variant != 0) barrier_ones_ += __builtin_popcount(lanes & read(i.predicate[0]));
          barrier_threads_ += __builtin_popcount(lanes);
          reduction_ = i.variant;
          return leave(State::kAtBarrier, lanes, 0);
        default:
          break;
      }
      if (mask == 0) continue;
      if (i.sources > 0) a = read(i.source[0], room[0]);
      if (i.sources > 1) b = read(i.source[1], room[1]);
      if (i.sources > 2) c = read(i.source[2], room[2]);
      const auto x = reinterpret_cast<const float*>(a), y = reinterpret_cast<const float*>(b),
                 z = reinterpret_cast<const float*>(c);
      float* const out = result.floats();
      switch (i.op) {
        case Op::kMove:
          std::memcpy(result.v, a, sizeof(Row));
          write(i.to, result, mask);
          break;
        case Op::kIadd3:
          if (i.packed) {
            EACH result.v[l] = ((a[l] ^ b[l]) & 0x80008000) ^ ((a[l] & 0x7fff7fff) + (b[l] & 0x7fff7fff));
            write(i.to, result, mask);
          } else {
            add(i, mask, a, b, c);
          }
          break;
        case Op::kImad: {
          const uint32_t carry = i.extended && i.predicates ? read(i.predicate[0]) : 0;
          if (i.results) fail(0, "this form is not known");
          EACH result.v[l] = a[l] * b[l] + c[l] + (carry >> l & 1);
          write(i.to, result, mask);
          break;
        }
        case Op::kImadWide:
        case Op::kImadHigh:
          multiply_wide(i, mask, a, b);
          break;
        case Op::kLea:
        case Op::kLeaHigh:
          shift_and_add(i, mask, b, c);
          break;
        case Op::kShift:
          shift(i, mask, a, b, c);
          break;
        case Op::kLop3: {
          const uint32_t table = i.immediate;
          EACH result.v[l] = logic(table, a[l], b[l], c[l]);
          const uint32_t before = read(i.predicate[0]);
          if (i.results) {
            const uint32_t some = lanes_where([&](int l) { return result.v[l] != 0; });
            write_predicate(i.to_predicate[0], i.any ? some | before : some & before, mask);
          }
          write(i.to, result, mask);
          break;
        }
        case Op::kPlop3: {
          const uint32_t p = read(i.predicate[0]), q = read(i.predicate[1]), r = read(i.predicate[2]);
          const uint32_t first = logic(i.immediate, p, q, r), second = logic(i.bank, p, q, r);
          write_predicate(i.to_predicate[0], first, mask);
          write_predicate(i.to_predicate[1], second, mask);
          break;
        }
        case Op::kSelect: {
          const uint32_t which = read(i.predicate[0]);
          EACH result.v[l] = which >> l & 1 ? a[l] : b[l];
          write(i.to, result, mask);
          break;
        }
        case Op::kIsetp:
          compare_integers(i, mask, a, b);
          break;
        case Op::kFset: {
          const uint32_t set = combine(i, compared(i.compare, x, y), i.predicates ? read(i.predicate[0]) : kAll);
          EACH out[l] = set >> l & 1;
          write(i.to, result, mask);
          break;
        }
        case Op::kFsetp: {
          if (i.ftz) {
            std::memcpy(result.v, a, sizeof(Row)), std::memcpy(upper.v, b, sizeof(Row));
            flush(result.v), flush(upper.v);
            set_predicates(i, mask, compared(i.compare, result.floats(), upper.floats()));
          } else {
            set_predicates(i, mask, compared(i.compare, x, y));
          }
          break;
        }
        case Op::kDsetp: {
          double p[kLanes], q[kLanes];
          EACH p[l] = read_double(i.source[0], l), q[l] = read_double(i.source[1], l);
          if (i.variant == 1) {  // of a maximum: whether it is the first, and whether it is no number, as PTX says of max
            const auto first = [&](int l) {
              return q[l] != q[l] || p[l] > q[l] || (p[l] == q[l] && std::signbit(p[l]) < std::signbit(q[l]));
            };
            write_predicate(i.to_predicate[0], lanes_where(first), mask);
            write_predicate(i.to_predicate[1], lanes_where([&](int l) { return p[l] != p[l] && q[l] != q[l]; }), mask);
            break;
          }
          set_predicates(i, mask, compared(i.compare, p, q));
          break;
        }
        case Op::kIminmax: {
          const uint32_t least = read(i.predicate[0]);
          const bool is_signed = i.type == Type::kS32;
          const auto choose = [&](uint32_t p, uint32_t q, int l) {
            const bool less = is_signed ? int32_t(p) < int32_t(q) : p < q;
            return less == (least >> l & 1) ? p : q;
          };
          if (i.variant == 1) {
            EACH result.v[l] = choose(a[l] + b[l], c[l], l);
          } else {
            EACH result.v[l] = choose(a[l], b[l], l);
            if (i.variant == 2) EACH result.v[l] = choose(result.v[l], c[l], l);
          }
          if (i.packed) {
            if (i.variant == 1) fail(0, "this form is not known");
            const auto half = [&](uint32_t value) {
              return is_signed ? static_cast<uint32_t>(int32_t{static_cast<int16_t>(value)}) : value & 0xffff;
            };
            const auto of_halves = [&](int shift, int l) {
              const uint32_t chosen = choose(half(a[l] >> shift), half(b[l] >> shift), l);
              return (i.variant == 2 ? choose(chosen, half(c[l] >> shift), l) : chosen) & 0xffff;
            };
            EACH result.v[l] = of_halves(16, l) << 16 | of_halves(0, l);
          }
          write(i.to, result, mask);
          break;
        }
        case Op::kIabs:
          EACH result.v[l] = int32_t(a[l]) < 0 ? -a[l] : a[l];
          write(i.to, result, mask);
          break;
        case Op::kPrmt:
          EACH result.v[l] = permuted(a[l], b[l], c[l]);
          write(i.to, result, mask);
          break;
        case Op::kPopc:
          EACH result.v[l] = __builtin_popcount(a[l]);
          write(i.to, result, mask);
          break;
        case Op::kFlo:
          EACH {
            const uint32_t value = i.type == Type::kS32 && int32_t(a[l]) < 0 ? ~a[l] : a[l];
            const int first = value == 0 ? -1 : 31 - __builtin_clz(value);
            result.v[l] = i.high && first >= 0 ? 31 - first : first;
          }
          write(i.to, result, mask);
          break;
        case Op::kSignExtend:
          EACH {
            const uint32_t bits = std::min(b[l], 32u);
            const uint32_t kept = bits == 32 ? a[l] : a[l] & ((1u << bits) - 1);
            const bool negative = i.type == Type::kS32 && bits > 0 && bits < 32 && (a[l] >> (bits - 1) & 1);
            result.v[l] = negative ? kept | ~((1u << bits) - 1) : kept;
          }
          write(i.to, result, mask);
          break;
        case Op::kHalfSetp: {
          Row halves[4];
          for (int place = 0; place < 2; ++place)
            EACH halves[2 * place].floats()[l] = half_at(i, 0, a[l], place),
                 halves[2 * place + 1].floats()[l] = half_at(i, 1, b[l], place);
          const uint32_t other = i.predicates ? read(i.predicate[0]) : kAll;
          for (int place = 0; place < 2; ++place) {
            const uint32_t one = compared(i.compare, halves[2 * place].floats(), halves[2 * place + 1].floats());
            write_predicate(i.to_predicate[place], combine(i, one, other), mask);
          }
          break;
        }
        case Op::kBrev:
          EACH {
            uint32_t value = a[l], reversed = 0;
            for (int bit = 0; bit < 32; ++bit, value >>= 1) reversed = reversed << 1 | (value & 1);
            result.v[l] = reversed;
          }
          write(i.to, result, mask);
          break;
        case Op::kFadd:
          rounding(i.round, [&] { EACH out[l] = x[l] + y[l]; });
          write_float(i, result, mask);
          break;
        case Op::kFmul:
          rounding(i.round, [&] { EACH out[l] = i.variant ? static_cast<float>(0.5 * x[l] * y[l]) : x[l] * y[l]; });
          write_float(i, result, mask);
          break;
        case Op::kFfma:
          rounding(i.round, [&] { EACH out[l] = __builtin_fmaf(x[l], y[l], z[l]); });
          write_float(i, result, mask);
          break;
        case Op::kFminmax: {
          const uint32_t least = read(i.predicate[0]);
          EACH {
            const float p = x[l], q = y[l];
            const bool tie = p == q && (a[l] >> 31) != (b[l] >> 31), less = tie ? a[l] >> 31 : p < q;
            float chosen = less == bool(least >> l & 1) ? p : q;
            if (q != q) chosen = i.any ? q : p;
            if (p != p) chosen = i.any ? p : q;
            out[l] = chosen;
          }
          if (i.wraps) {  // the sign is not that of the chosen one
            const auto sign = [&](const Source& source, int l) { return as_stored(source)[l] ^ source.flip; };
            EACH result.v[l] = (result.v[l] & 0x7fffffff) | ((sign(i.source[0], l) ^ sign(i.source[1], l)) & 0x80000000);
          }
          write_float(i, result, mask);
          break;
        }
        case Op::kFchk:
          write_predicate(i.to_predicate[0], lanes_where([&](int l) { return divides_slowly(x[l], y[l]); }), mask);
          break;
        case Op::kMufu:
          if (i.variant >= 8) {
            EACH {
              const double value = double_of(0, a[l]);
              const double bounded = std::fabs(value) < 0x1p-1022 ? std::copysign(0.0, value) : value;
              result.v[l] = bits_of(i.variant == 8 ? 1 / bounded : 1 / std::sqrt(bounded)) >> 32;
            }
            write(i.to, result, mask);
          } else {
            EACH_OF(mask) out[l] = special(i.variant, x[l]);
            write_float(i, result, mask);
          }
          break;
        case Op::kFround:
          EACH out[l] = to_integer(x[l], i.round);
          write_float(i, result, mask);
          break;
        case Op::kFloatToInt:
          float_to_int(i, mask, x);
          break;
        case Op::kIntToFloat:
          int_to_float(i, mask, a);
          break;
        case Op::kFloatToFloat:
          float_to_float(i, mask, x);
          break;
        case Op::kPackFloats:
          EACH {
            const float high = i.saturates && x[l] < 0 ? 0 : x[l], low = i.saturates && y[l] < 0 ? 0 : y[l];
            result.v[l] = i.type == Type::kF16 ? uint32_t{half_of(high)} << 16 | half_of(low)
                                               : uint32_t{brain_of(high)} << 16 | brain_of(low);
          }
          if (i.round != Round::kNearest) fail(0, "this form is not known");
          write(i.to, result, mask);
          break;
        case Op::kHalfToFloat:
          EACH out[l] = half_at(i, 0, a[l], 0) + half_at(i, 1, b[l], 0);
          write_float(i, result, mask);
          break;
        case Op::kHalfAdd:
        case Op::kHalfMul:
        case Op::kHalfFma:
        case Op::kHalfMinmax:
          halves(i, mask, a, b, c);
          break;
        case Op::kDadd:
        case Op::kDmul:
        case Op::kDfma:
          doubles(i, mask);
          break;
        case Op::kShuffle:
          shuffle(i, lanes, a, b, c);
          break;
        case Op::kVote: {
          const uint32_t votes = lanes & read(i.predicate[0]);
          EACH result.v[l] = votes;
          write_predicate(i.to_predicate[0], (i.any ? votes != 0 : votes == lanes) ? kAll : 0, mask);
          write(i.to, result, mask);
          break;
        }
        case Op::kMatch: {
          uint32_t all = kAll;
          EACH_OF(lanes) {
            const auto same = [&](int m) {
              return a[m] == a[l] && (i.bytes == 4 || read_high(i.source[0])[m] == read_high(i.source[0])[l]);
            };
            result.v[l] = lanes & lanes_where(same);
            if (result.v[l] != lanes) all = 0;
          }
          if (!i.any) EACH result.v[l] = lanes & all;
          write_predicate(i.to_predicate[0], all, mask);
          write(i.to, result, mask);
          break;
        }
        case Op::kRedux: {
          uint32_t value = a[__builtin_ctz(lanes)];
          EACH_OF(lanes & (lanes - 1)) value = static_cast<uint32_t>(combined(i.atomic, i.type, value, a[l], 0));
          EACH result.v[l] = value;
          write(i.to, result, mask);
          break;
        }
        case Op::kPredicatesToRegister:
          EACH {
            uint32_t bits = 0;
            const int first = i.uniform ? kUniformPredicates : 0;
            for (int p = 0; p < 7; ++p) bits |= (warp.predicates[first + p] >> l & 1) << p;
            result.v[l] = (bits & b[l]) | (a[l] & ~b[l]);
          }
          write(i.to, result, mask);
          break;
        case Op::kRegisterToPredicates:
          for (int p = 0; p < 7; ++p) {
            const uint32_t chosen = mask & lanes_where([&](int l) { return b[l] >> p & 1; });
            write_predicate(p, lanes_where([&](int l) { return a[l] >> p & 1; }), chosen);
          }
          break;
        case Op::kSpecial:
          EACH result.v[l] = special_register(i.variant, l);
          write(i.to, result, mask);
          if (i.bytes == 8) {
            if (i.variant != 0) fail(0, "this form is not known");
            write(i.to_high, result, mask);
          }
          break;
        case Op::kLoadConstant:
          load_constant(i, mask);
          break;
        case Op::kToUniform: {
          const uint32_t value = a[__builtin_ctz(lanes)];
          EACH result.v[l] = value;
          write(i.to, result, mask);
          break;
        }
        case Op::kGlobalLoad: {
          uint64_t places[kLanes];
          global(i, i.address, i.bytes, mask, places, "reads");
          load(i, mask, [&](int l) { return reinterpret_cast<const char*>(places[l]); });
          break;
        }
        case Op::kGlobalStore: {
          uint64_t places[kLanes];
          global(i, i.address, i.bytes, mask, places, "writes");
          store(i, mask, [&](int l) { return reinterpret_cast<char*>(places[l]); });
          break;
        }
        case Op::kGlobalAtomic: {
          uint64_t places[kLanes];
          global(i, i.address, i.bytes, mask, places, "adds to");
          atomic(i, mask, [&](int l) { return reinterpret_cast<char*>(places[l]); });
          break;
        }
        case Op::kSharedLoad: {
          uint32_t places[kLanes];
          shared(i.address, i.bytes, mask, places, Access::kRead);
          mark_unwritten(i, mask, places);
          load(i, mask, [&](int l) { return shared_.data() + places[l]; });
          break;
        }
        case Op::kSharedStore: {
          uint32_t places[kLanes];
          shared(i.address, i.bytes, mask, places, Access::kWrite);
          store(i, mask, [&](int l) { return shared_.data() + places[l]; });
          check_repeated();
          if (warp.has_unwritten) store_unwritten(i, mask, places);
          break;
        }
        case Op::kSharedAtomic: {
          uint32_t places[kLanes];
          shared(i.address, i.bytes, mask, places, Access::kAtomic);
          atomic(i, mask, [&](int l) { return shared_.data() + places[l]; });
          break;
        }
        case Op::kSharedMatrices:
          load_matrices(i, mask);
          break;
        case Op::kStoreMatrices:
          store_matrices(i, mask);
          break;
        case Op::kCopyToShared: {
          uint64_t from[kLanes];
          uint32_t to[kLanes];
          uint32_t copies = mask;
          for (int p = 0; p < i.predicates; ++p) copies &= read(i.predicate[p]);
          shared(i.address, i.bytes, mask, to, Access::kWrite);
          if (copies) global(i, i.second, i.bytes, copies, from, "reads");
          EACH_OF(mask & ~copies) std::memset(shared_.data() + to[l], 0, i.bytes);
          EACH_OF(copies) std::memcpy(shared_.data() + to[l], reinterpret_cast<const char*>(from[l]), i.bytes);
          check_repeated();
          break;
        }
        case Op::kLocalLoad:
        case Op::kLocalStore: {
          char* places[kLanes];
          local(i, mask, places);
          if (i.op == Op::kLocalLoad) {
            load(i, mask, [&](int l) { return places[l]; });
          } else {
            store(i, mask, [&](int l) { return places[l]; });
          }
          break;
        }
        case Op::kMma:
          multiply_matrices(i, mask);
          break;
        case Op::kGroupMma:
          multiply_in_group(i, mask);
          break;
        case Op::kIadd64:
          EACH {
            uint64_t sum = 0;
            for (const Source& source : i.source) {
              if (source.modified) fail(l, "this form is not known");
              sum += as_stored(source)[l] | uint64_t{read_high(source)[l]} << 32;
            }
            result.v[l] = static_cast<uint32_t>(sum), upper.v[l] = sum >> 32;
          }
          write(i.to, result, mask);
          write(i.to_high, upper, mask);
          break;
        case Op::kBarrierResult: {
          EACH result.v[l] = results_ones_;
          const bool set = results_kind_ == 2 ? results_ones_ == results_threads_ : results_ones_ != 0;
          write(i.to, result, mask);
          write_predicate(i.to_predicate[0], set ? kAll : 0, mask);
          break;
        }
        case Op::kMoveBarrier:
          if (i.variant == 0) {
            EACH if (mask >> l & 1) warp.rows[kBarriers + i.bank].v[l] = a[l];
          } else {
            write(i.to, warp.rows[kBarriers + i.bank], mask);
            if (i.any) EACH if (mask >> l & 1) warp.rows[kBarriers + i.bank].v[l] = 0;
          }
          break;
        case Op::kTrap:
          fail(__builtin_ctz(lanes), "a trap");
        case Op::kNop:
          break;
        default:
          fail(__builtin_ctz(lanes), "this instruction is not known");
      }
    }
  }

  // Of the lanes that run some jump; false where the group has been parted.
  bool jump(uint32_t& pc, uint32_t active, uint32_t jumps, uint32_t target) {
    if (jumps == 0) return true;
    if (jumps == active) return pc = target - 1, true;
    const Group jumped{jumps, target}, stayed{active & ~jumps, pc + 1};
    warp_->groups.push_back(forward_ ? jumped : stayed);
    warp_->groups.push_back(forward_ ? stayed : jumped);
    return false;
  }

  void set_predicates(const Instruction& i, uint32_t mask, uint32_t value) {
    const uint32_t other = i.predicates ? read(i.predicate[0]) : kAll;
    write_predicate(i.to_predicate[0], combine(i, value, other), mask);
    write_predicate(i.to_predicate[1], combine(i, ~value, other), mask);
  }
  static uint32_t combine(const Instruction& i, uint32_t one, uint32_t other) {
    return i.combine == Combine::kAnd ? one & other : i.combine == Combine::kOr ? one | other : one ^ other;
  }

  template <typename T>
  static uint32_t compared(Compare compare, const T* a, const T* b) {
    const uint32_t nan = lanes_where([&](int l) { return a[l] != a[l] || b[l] != b[l]; });
    const auto ordered = [&]() -> uint32_t {
      switch (compare) {
        case Compare::kLt: case Compare::kLtu: return lanes_where([&](int l) { return a[l] < b[l]; });
        case Compare::kEq: case Compare::kEqu: return lanes_where([&](int l) { return a[l] == b[l]; });
        case Compare::kLe: case Compare::kLeu: return lanes_where([&](int l) { return a[l] <= b[l]; });
        case Compare::kGt: case Compare::kGtu: return lanes_where([&](int l) { return a[l] > b[l]; });
        case Compare::kNe: case Compare::kNeu: return lanes_where([&](int l) { return a[l] != b[l]; });
        case Compare::kGe: case Compare::kGeu: return lanes_where([&](int l) { return a[l] >= b[l]; });
        case Compare::kNum: case Compare::kTrue: return kAll;
        default: return 0;
      }
    };
    const bool takes_nan = compare == Compare::kNan || compare >= Compare::kLtu;
    return takes_nan ? ordered() | nan : ordered() & ~nan;
  }

  void compare_integers(const Instruction& i, uint32_t mask, const uint32_t* a, const uint32_t* b) {
    const auto p = reinterpret_cast<const int32_t*>(a), q = reinterpret_cast<const int32_t*>(b);
    const bool is_signed = i.type == Type::kS32;
    const uint32_t equal = lanes_where([&](int l) { return a[l] == b[l]; });
    const uint32_t less = is_signed ? lanes_where([&](int l) { return p[l] < q[l]; })
                                    : lanes_where([&](int l) { return a[l] < b[l]; });
    // Of the lower halves; without them equal numbers are equal.
    const uint32_t lower = i.extended ? read(i.predicate[1]) : 0;
    uint32_t value = 0;
    switch (i.compare) {
      case Compare::kLt: value = less | (equal & lower); break;
      case Compare::kEq: value = equal & (i.extended ? lower : kAll); break;
      case Compare::kLe: value = less | (equal & (i.extended ? lower : kAll)); break;
      case Compare::kGt: value = ~(less | equal) | (equal & lower); break;
      case Compare::kNe: value = ~equal | lower; break;
      case Compare::kGe: value = ~(less | equal) | (equal & (i.extended ? lower : kAll)); break;
      case Compare::kTrue: value = kAll; break;
      case Compare::kFalse: break;
      default: fail(0, "this form is not known");
    }
    set_predicates(i, mask, value);
  }

  static uint32_t logic(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
    switch (table) {
      case 0xc0: return a & b;
      case 0xfc: return a | b;
      case 0x3c: return a ^ b;
      case 0x33: return ~b;
      case 0x0f: return ~a;
      case 0x55: return ~c;
      case 0x80: return a & b & c;
      case 0xfe: return a | b | c;
      case 0x96: return a ^ b ^ c;
      case 0xf8: return a | (b & c);
      case 0xea: return (a & b) | c;
      default: break;
    }
    uint32_t result = 0;
    for (int bit = 0; bit < 8; ++bit)
      if (table >> bit & 1) result |= (bit & 4 ? a : ~a) & (bit & 2 ? b : ~b) & (bit & 1 ? c : ~c);
    return result;
  }

  static uint32_t permuted(uint32_t a, uint32_t selector, uint32_t b) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t which = selector >> 4 * byte & 15;
      uint32_t value = both >> 8 * (which & 7) & 255;
      if (which & 8) value = value & 128 ? 255 : 0;
      result |= value << 8 * byte;
    }
    return result;
  }

  void add(const Instruction& i, uint32_t mask, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
    Row result;
    uint32_t carries[2] = {0, 0};
    if (i.extended)
      for (int p = 0; p < i.predicates; ++p) carries[p] = read(i.predicate[p]);
    if (i.results == 0) {
      if (i.sources == 2) {
        EACH result.v[l] = a[l] + b[l];
      } else {
        EACH result.v[l] = a[l] + b[l] + c[l] + (carries[0] >> l & 1) + (carries[1] >> l & 1);
      }
      return write(i.to, result, mask);
    }
    // Of a negated number the complement and 1 are added, and the 1 may carry.
    uint64_t sums[kLanes];
    EACH sums[l] = uint64_t{a[l]} + b[l] + c[l] + (carries[0] >> l & 1) + (carries[1] >> l & 1);
    const uint32_t* values[3] = {a, b, c};
    for (int s = 0; s < 3; ++s)
      if (i.source[s].negated) EACH sums[l] += values[s][l] == 0 ? uint64_t{1} << 32 : 0;
    EACH result.v[l] = static_cast<uint32_t>(sums[l]);
    write(i.to, result, mask);
    write_predicate(i.to_predicate[0], lanes_where([&](int l) { return sums[l] >> 32 >= 1; }), mask);
    if (i.results == 2)
      write_predicate(i.to_predicate[1], lanes_where([&](int l) { return sums[l] >> 32 >= 2; }), mask);
  }

  void multiply_wide(const Instruction& i, uint32_t mask, const uint32_t* a, const uint32_t* b) {
    const Source& third = i.source[2];
    if (third.modified && (!third.negated || third.absolute || i.results || i.op != Op::kImadWide))
      fail(0, "this form is not known");
    if (i.source[0].modified || i.source[1].modified || i.extended || i.predicates) fail(0, "this form is not known");
    const uint32_t *low = base_[third.pool] + size_t{third.row} * kLanes, *high = read_high(third);
    Row result, upper;
    uint32_t carry = 0;
    EACH {
      const uint64_t product = i.type == Type::kU32 ? uint64_t{a[l]} * b[l] : int64_t{int32_t(a[l])} * int32_t(b[l]);
      const uint64_t added = uint64_t{high[l]} << 32 | low[l], sum = product + (third.negated ? -added : added);
      result.v[l] = static_cast<uint32_t>(sum), upper.v[l] = sum >> 32;
      carry |= uint32_t{sum < product} << l;
    }
    if (i.op == Op::kImadHigh) return write(i.to, upper, mask);
    write(i.to, result, mask);
    write(i.to_high, upper, mask);
    if (i.results) write_predicate(i.to_predicate[0], carry, mask);
  }

  // LEA: (a << shift) + b. LEA.HI: the upper half of a pair so shifted, + b; X: and a carry.
  void shift_and_add(const Instruction& i, uint32_t mask, const uint32_t* b, const uint32_t* c) {
    const Source& first = i.source[0];
    const uint32_t* a = base_[first.pool] + size_t{first.row} * kLanes;
    const uint32_t shift = i.immediate & 31;
    const bool high = i.op == Op::kLeaHigh, complements = first.modified;
    const uint32_t carry = i.extended ? read(i.predicate[0]) : 0;
    if (c == nullptr && high && !i.wraps) fail(0, "this form is not known");
    Row result;
    uint64_t sums[kLanes];
    EACH {
      uint32_t term = a[l] << shift;
      if (high) {
        const uint64_t pair = i.wraps ? static_cast<uint64_t>(int64_t{int32_t(a[l])}) : uint64_t{c[l]} << 32 | a[l];
        term = static_cast<uint32_t>(pair << shift >> 32);
      }
      const uint64_t one = first.negated ? uint64_t{~term} + 1 : complements ? ~term : term;
      sums[l] = one + b[l] + (carry >> l & 1);
      result.v[l] = static_cast<uint32_t>(sums[l]);
    }
    if (i.source[1].negated) EACH sums[l] += b[l] == 0 ? uint64_t{1} << 32 : 0;
    write(i.to, result, mask);
    if (i.results) write_predicate(i.to_predicate[0], lanes_where([&](int l) { return sums[l] >> 32 != 0; }), mask);
  }

  // Of the pair of c, the upper half, and a.
  void shift(const Instruction& i, uint32_t mask, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
    const bool wide = i.type == Type::kU64 || i.type == Type::kS64;
    const bool is_signed = i.type == Type::kS32 || i.type == Type::kS64;
    const uint32_t most = wide ? 63 : 32;
    Row result;
    EACH {
      const uint32_t by = i.wraps ? b[l] & (wide ? 63 : 31) : std::min(b[l], most);
      const uint64_t pair = uint64_t{c[l]} << 32 | a[l];
      const uint64_t shifted = i.left       ? pair << by
                               : is_signed ? static_cast<uint64_t>(static_cast<int64_t>(pair) >> by)
                                           : pair >> by;
      result.v[l] = static_cast<uint32_t>(i.high ? shifted >> 32 : shifted);
    }
    write(i.to, result, mask);
  }

  void float_to_int(const Instruction& i, uint32_t mask, const float* x) {
    Row result, upper;
    EACH_OF(mask) {
      double value = i.from == Type::kF64 ? read_double(i.source[0], l) : x[l];
      if (i.ftz && std::fabs(value) < 1.17549435e-38) value = 0;
      value = to_integer(value, i.round);
      const bool nan = value != value;
      uint64_t bits = 0;
      switch (i.type) {
        case Type::kU32: bits = nan ? 0 : value <= 0 ? 0 : value >= 0x1p32 ? kAll : uint32_t(value); break;
        case Type::kS32:
          bits = nan ? 0 : value <= -0x1p31 ? 0x80000000 : value >= 0x1p31 ? 0x7fffffff : uint32_t(int32_t(value));
          if (nan && !i.nan_to_zero) bits = 0x80000000;
          break;
        case Type::kU64: bits = nan ? 0 : value <= 0 ? 0 : value >= 0x1p64 ? ~uint64_t{0} : uint64_t(value); break;
        case Type::kS64:
          bits = value <= -0x1p63 ? uint64_t{1} << 63 : value >= 0x1p63 ? ~uint64_t{0} >> 1 : uint64_t(int64_t(value));
          if (nan) bits = i.nan_to_zero ? 0 : uint64_t{1} << 63;
          break;
        default: fail(l, "this form is not known");
      }
      if (nan && !i.nan_to_zero && i.type == Type::kU32) bits = uint64_t{1} << 31;
      if (nan && !i.nan_to_zero && i.type == Type::kU64) bits = uint64_t{1} << 63;
      result.v[l] = static_cast<uint32_t>(bits), upper.v[l] = bits >> 32;
    }
    write(i.to, result, mask);
    if (i.type == Type::kU64 || i.type == Type::kS64) write(i.to_high, upper, mask);
  }

  void int_to_float(const Instruction& i, uint32_t mask, const uint32_t* a) {
    int64_t values[kLanes];
    EACH {
      switch (i.from) {
        case Type::kU8: values[l] = uint8_t(a[l]); break;
        case Type::kS8: values[l] = int8_t(a[l]); break;
        case Type::kU16: values[l] = uint16_t(a[l]); break;
        case Type::kS16: values[l] = int16_t(a[l]); break;
        case Type::kU32: values[l] = a[l]; break;
        case Type::kS32: values[l] = int32_t(a[l]); break;
        default: values[l] = static_cast<int64_t>(read_wide(i.source[0], l));
      }
    }
    if (i.source[0].modified && i.from >= Type::kU64) fail(0, "this form is not known");
    Row result, upper;
    if (i.type == Type::kF64) {
      EACH {
        const uint64_t bits = bits_of(i.from == Type::kU64 ? double(uint64_t(values[l])) : double(values[l]));
        result.v[l] = static_cast<uint32_t>(bits), upper.v[l] = bits >> 32;
      }
      write(i.to_high, upper, mask);
    } else if (i.type == Type::kF32) {
      rounding(i.round, [&] {
        if (i.from == Type::kU64) {
          EACH result.floats()[l] = static_cast<float>(static_cast<uint64_t>(values[l]));
        } else {
          EACH result.floats()[l] = static_cast<float>(values[l]);
        }
      });
    } else {
      fail(0, "this form is not known");
    }
    write(i.to, result, mask);
  }

  void float_to_float(const Instruction& i, uint32_t mask, const float* x) {
    Row result, upper;
    double values[kLanes];
    EACH values[l] = i.from == Type::kF64 ? read_double(i.source[0], l) : x[l];
    if (i.from != Type::kF64 && i.from != Type::kF32) fail(0, "this form is not known");
    if (i.type == Type::kF64) {
      EACH {
        const uint64_t bits = bits_of(values[l]);
        result.v[l] = static_cast<uint32_t>(bits), upper.v[l] = bits >> 32;
      }
      write(i.to_high, upper, mask);
    } else if (i.type == Type::kF32) {
      rounding(i.round, [&] { EACH result.floats()[l] = static_cast<float>(values[l]); });
      EACH result.v[l] = bits_of(result.floats()[l]);
    } else {
      if (i.from == Type::kF64 || i.round != Round::kNearest) fail(0, "this form is not known");
      EACH result.v[l] = i.type == Type::kF16 ? half_of(x[l]) : brain_of(x[l]);
    }
    write(i.to, result, mask);
  }

  float half_at(const Instruction& i, int source, uint32_t bits, int place) const {
    const uint8_t half = i.source[source].half;
    const uint16_t value = static_cast<uint16_t>((half == 2 || (half == 0 && place == 1)) ? bits >> 16 : bits);
    return i.brain ? float_of(uint32_t{value} << 16) : float_of_half(value);
  }

  void halves(const Instruction& i, uint32_t mask, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
    Row result;
    const uint32_t least = i.op == Op::kHalfMinmax ? read(i.predicate[0]) : 0;
    EACH {
      uint32_t bits = 0;
      for (int place = 0; place < 2; ++place) {
        const float p = half_at(i, 0, a[l], place), q = half_at(i, 1, b[l], place);
        const auto chosen = [&](float one, float other) {
          return (one < other) == bool(least >> l & 1) || other != other ? one : other;
        };
        float value;
        switch (i.op) {
          case Op::kHalfAdd: value = p + q; break;
          case Op::kHalfMul: value = p * q; break;
          // Exact in double but for the last rounding, which is made once more: as seldom wrong as it matters.
          case Op::kHalfFma: value = static_cast<float>(double{p} * q + half_at(i, 2, c[l], place)); break;
          default:
            value = chosen(p, q);
            if (i.sources == 3) value = chosen(value, half_at(i, 2, c[l], place));
        }
        if (i.saturates) value = value > 0 ? std::min(value, 1.0f) : 0;
        bits |= uint32_t{i.brain ? brain_of(value) : half_of(value)} << 16 * place;
      }
      result.v[l] = bits;
    }
    write(i.to, result, mask);
  }

  void doubles(const Instruction& i, uint32_t mask) {
    Row result, upper;
    double p[kLanes], q[kLanes], r[kLanes] = {}, values[kLanes];
    EACH p[l] = read_double(i.source[0], l), q[l] = read_double(i.source[1], l);
    if (i.op == Op::kDfma) EACH r[l] = read_double(i.source[2], l);
    rounding(i.round, [&] {
      if (i.op == Op::kDadd) EACH values[l] = p[l] + q[l];
      if (i.op == Op::kDmul) EACH values[l] = p[l] * q[l];
      if (i.op == Op::kDfma) EACH values[l] = __builtin_fma(p[l], q[l], r[l]);
    });
    EACH {
      const uint64_t bits = bits_of(values[l]);
      result.v[l] = static_cast<uint32_t>(bits), upper.v[l] = bits >> 32;
    }
    write(i.to, result, mask);
    write(i.to_high, upper, mask);
  }

  void shuffle(const Instruction& i, uint32_t lanes, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
    Row result;
    uint32_t inside = 0;
    EACH_OF(lanes) {
      const uint32_t by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
      const uint32_t last = (l & segment) | (clamp & ~segment), first = l & segment;
      int from;
      bool within;
      switch (i.variant) {
        case 0: from = first | (by & ~segment), within = from <= int(last); break;
        case 1: from = int(l) - int(by), within = from >= int(last); break;
        case 2: from = int(l + by), within = from <= int(last); break;
        default: from = int(l ^ by), within = from <= int(last);
      }
      if (!within) from = l;
      inside |= uint32_t{within} << l;
      if (warp_->unwritten[i.source[0].row] >> from & 1 && !i.source[0].pool) warp_->unwritten[i.to] |= 1u << l;
      if (!(lanes >> from & 1)) fail(l, "reads lane " + std::to_string(from) + ", which is not there");
      result.v[l] = a[from];
    }
    write(i.to, result, lanes);
    write_predicate(i.to_predicate[0], inside, lanes);
  }

  uint32_t special_register(uint8_t which, int l) const {
    const unsigned thread = number_ * 32 + l;
    switch (which) {
      case 1: return thread % launch_.block.x;
      case 2: return thread / launch_.block.x % launch_.block.y;
      case 3: return thread / launch_.block.x / launch_.block.y;
      case 4: return block_.x;
      case 5: return block_.y;
      case 6: return block_.z;
      case 7: return l;
      case 9: return 1u << l;
      case 10: return (1u << l) - 1;
      case 11: return (2u << l) - 1;
      case 12: return ~((2u << l) - 1);
      case 13: return ~((1u << l) - 1);
      default: return 0;
    }
  }

  void load_constant(const Instruction& i, uint32_t mask) {
    Row result, upper;
    const uint32_t *row = warp_->rows[i.address.row].v, *uniform = warp_->rows[i.address.uniform].v;
    uint32_t before = 0;
    bool known = false;
    EACH_OF(mask) {
      const uint32_t place = row[l] + uniform[l] + i.address.offset;
      if (known && place == before) {
        result.v[l] = result.v[__builtin_ctz(mask)], upper.v[l] = upper.v[__builtin_ctz(mask)];
        continue;
      }
      try {
        result.v[l] = constant_at(i.bank, place, std::min<unsigned>(i.bytes, 4), true);
        upper.v[l] = i.bytes == 8 ? constant_at(i.bank, place + 4, 4, true) : 0;
      } catch (const Fault& fault) {
        fail(l, fault.what());
      }
      if (i.type == Type::kS8) result.v[l] = static_cast<uint32_t>(int32_t{int8_t(result.v[l])});
      if (i.type == Type::kS16) result.v[l] = static_cast<uint32_t>(int32_t{int16_t(result.v[l])});
      if (place % i.bytes) fail(l, "a misaligned address");
      if (!known) before = place, known = true;
    }
    write(i.to, result, mask);
    if (i.bytes == 8) write(i.to_high, upper, mask);
  }

  uint16_t row_of(uint16_t first, int number) const { return first == kZero ? first : first + number; }

  template <typename Place>
  void load(const Instruction& i, uint32_t mask, Place place) {
    Row* const to = warp_->rows + i.to;
    switch (i.type) {
      case Type::kU8: EACH_OF(mask) to->v[l] = static_cast<uint8_t>(*place(l)); return;
      case Type::kS8: EACH_OF(mask) to->v[l] = static_cast<uint32_t>(int32_t{static_cast<int8_t>(*place(l))}); return;
      case Type::kU16: case Type::kS16:
        EACH_OF(mask) {
          uint16_t value;
          std::memcpy(&value, place(l), 2);
          to->v[l] = i.type == Type::kU16 ? value : static_cast<uint32_t>(int32_t{static_cast<int16_t>(value)});
        }
        return;
      default:
        if (i.bytes == 4) {
          EACH_OF(mask) std::memcpy(&to->v[l], place(l), 4);
        } else {
          EACH_OF(mask)
            for (int word = 0; word < i.bytes / 4; ++word) std::memcpy(&to[word].v[l], place(l) + 4 * word, 4);
        }
    }
  }
  template <typename Place>
  void store(const Instruction& i, uint32_t mask, Place place) {
    const Source& source = i.source[0];
    if (source.modified) fail(0, "this form is not known");
    for (int word = 0; word < std::max(i.bytes / 4, 1); ++word) {
      const uint32_t* from = source.pool ? base_[1] + size_t{source.row} * kLanes
                                         : warp_->rows[row_of(source.row, word)].v;
      EACH_OF(mask) std::memcpy(place(l) + 4 * word, &from[l], std::min<int>(i.bytes, 4));
    }
  }

  static uint64_t combined(Atomic atomic, Type type, uint64_t old, uint64_t value, uint64_t third) {
    const auto larger = [&] {
      switch (type) {
        case Type::kS32: return int32_t(value) > int32_t(old);
        case Type::kS64: return int64_t(value) > int64_t(old);
        default: return value > old;
      }
    };
    switch (atomic) {
      case Atomic::kAdd:
        if (type == Type::kF32) return bits_of(float_of(uint32_t(old)) + float_of(uint32_t(value)));
        if (type == Type::kF64) {
          const uint64_t low = 0xffffffffu;
          return bits_of(double_of(old & low, old >> 32) + double_of(value & low, value >> 32));
        }
        return old + value;
      case Atomic::kMin: return larger() ? old : value;
      case Atomic::kMax: return larger() ? value : old;
      case Atomic::kInc: return old >= value ? 0 : old + 1;
      case Atomic::kDec: return old == 0 || old > value ? value : old - 1;
      case Atomic::kAnd: return old & value;
      case Atomic::kOr: return old | value;
      case Atomic::kXor: return old ^ value;
      case Atomic::kExch: return value;
      case Atomic::kCas: return old == value ? third : old;
    }
    return 0;
  }
  template <typename Place>
  void atomic(const Instruction& i, uint32_t mask, Place place) {
    EACH_OF(mask) {
      uint64_t old = 0, value = 1, third = 0;
      if (i.variant == 0) {
        value = i.bytes == 8 ? read_wide(i.source[0], l) : read_lane(i.source[0], l);
        if (i.sources > 1) third = i.bytes == 8 ? read_wide(i.source[1], l) : read_lane(i.source[1], l);
        for (int s = 0; s < i.sources; ++s)
          if (i.source[s].modified) fail(l, "this form is not known");
      }
      std::memcpy(&old, place(l), i.bytes);
      const uint64_t result = combined(i.atomic, i.type, old, value, third);
      std::memcpy(place(l), &result, i.bytes);
      warp_->rows[i.to].v[l] = static_cast<uint32_t>(old);
      if (i.bytes == 8) warp_->rows[i.to_high].v[l] = old >> 32;
    }
  }
  uint32_t read_lane(const Source& source, int l) const {
    return (base_[source.pool] + size_t{source.row} * kLanes)[l];
  }

  // The addresses of an access, which is checked and counted.
  void global(const Instruction&, const Address& address, unsigned bytes, uint32_t mask, uint64_t* places,
              const char* verb) {
    const uint32_t *low = warp_->rows[address.row].v, *high = warp_->rows[row_of(address.row, 1)].v;
    if (!address.wide) high = warp_->rows[kZero].v;
    const int first = __builtin_ctz(mask);
    const auto at = [&](int l) {
      return (uint64_t{high[l]} << 32 | low[l]) + static_cast<int64_t>(address.offset);
    };
    const uint64_t one = at(first);
    EACH places[l] = mask >> l & 1 ? at(l) : one;
    uint64_t least = one, most = one, bits = 0;
    EACH least = std::min(least, places[l]), most = std::max(most, places[l]), bits |= places[l];
    const Allocations::Range*& hint = hints_[pc_];
    if ((bits & (bytes - 1)) != 0 || hint == nullptr || least < hint->begin || most + bytes > hint->end)
      check_global(bytes, mask, places, verb, hint);
    if (counts_sectors_) count_sectors(mask, places, verb[0] == 'r');
  }
  [[gnu::noinline]] void check_global(
      unsigned bytes, uint32_t mask, const uint64_t* places, const char* verb, const Allocations::Range*& hint) {
    EACH_OF(mask) {
      const uint64_t place = places[l];
      std::ostringstream text;
      text << verb << " " << bytes << " bytes at 0x" << std::hex << place << std::dec;
      if (place % bytes) fail(l, text.str() + ", a misaligned address");
      const Allocations::Range* range = allocations_.find(place, bytes);
      if (range == nullptr) fail(l, text.str() + ", where nothing is allocated");
      if (place >= range->begin && place + bytes <= range->end) {
        hint = range;
        continue;
      }
      const bool before = place < range->begin;
      text << ", " << int64_t(before ? range->begin - place : place - range->end) << " bytes "
           << (before ? "before" : "behind the end of") << " an allocation of " << range->end - range->begin;
      fail(l, text.str());
    }
  }

  struct Page {
    uint64_t read[2] = {}, written[2] = {};
  };
  void count_sectors(uint32_t mask, const uint64_t* places, bool reads) {
    uint64_t sectors[kLanes];
    int count = 0;
    EACH_OF(mask) {
      const uint64_t sector = places[l] >> 5;
      int i = count;
      while (i > 0 && sectors[i - 1] != sector) --i;
      if (i == 0) sectors[count++] = sector;
    }
    counts_.requests[pc_] += 1, counts_.sectors[pc_] += count;
    for (int i = 0; i < count; ++i) {
      const uint64_t page = sectors[i] >> 7;
      if (page != last_page_number_ || last_page_ == nullptr) last_page_ = &pages_[page], last_page_number_ = page;
      uint64_t* const bits = reads ? last_page_->read : last_page_->written;
      bits[sectors[i] >> 6 & 1] |= uint64_t{1} << (sectors[i] & 63);
    }
  }

  enum class Access { kRead, kWrite, kAtomic };

  // Who has written a byte of shared memory, or read it: the number of the last barrier, and a warp.
  static constexpr uint32_t kSeveral = 62, kByAtomic = 63;
  uint32_t stamp(uint32_t who) const { return epoch_ << 6 | who; }
  bool by_another(uint32_t stamped, uint32_t who) const { return stamped >> 6 == epoch_ && (stamped & 63) != who; }

  void shared(const Address& address, unsigned bytes, uint32_t mask, uint32_t* places, Access access) {
    const uint32_t *row = warp_->rows[address.row].v, *uniform = warp_->rows[address.uniform].v;
    EACH places[l] = (row[l] << address.scale) + uniform[l] + address.offset;
    const uint32_t end = static_cast<uint32_t>(shared_.size());
    EACH_OF(mask) {
      const uint32_t place = places[l];
      if (place % bytes || place < kReserved || place > end - bytes) fail_shared(l, place, bytes);
      if (bytes < 4) {
        for (uint32_t i = place; i < place + bytes; ++i) check_shared(l, i, access);
      } else {
        for (uint32_t i = place; i < place + bytes; i += 4) check_word(l, i, access);
      }
    }
  }
  // As check_shared, of four bytes that nobody else has touched.
  void check_word(int l, uint32_t i, Access access) {
    uint32_t *const writers = &writers_[i], *const readers = &readers_[i];
    const uint32_t own = stamp(number_), first = epoch_ << 6;
    uint32_t touched = 0;  // later than the last barrier, and not by this warp alone
    for (int byte = 0; byte < 4; ++byte)
      touched |= (writers[byte] >= first && writers[byte] != own) | (readers[byte] >= first && readers[byte] != own);
    if (touched || access == Access::kAtomic) {
      for (int byte = 0; byte < 4; ++byte) check_shared(l, i + byte, access);
    } else {
      std::fill_n(access == Access::kRead ? readers : writers, 4, own);
    }
  }
  void check_shared(int l, uint32_t i, Access access) {
    uint32_t &writer = writers_[i], &reader = readers_[i];
    if (access == Access::kRead) {
      if (by_another(writer, number_))
        fail(l, "reads shared memory at " + std::to_string(i - kReserved) +
                    " that another warp has written since the last barrier");
      reader = by_another(reader, number_) ? stamp(kSeveral) : stamp(number_);
    } else {
      const uint32_t who = access == Access::kAtomic ? kByAtomic : number_;
      if (access == Access::kAtomic && writer == 0)
        fail(l, "adds to shared memory at " + std::to_string(i - kReserved) + " that was not written");
      if (by_another(writer, who)) {
        if (!kernel_.repeats || access == Access::kAtomic) fail_repeated(l, i);
        repeated_.push_back({l, i, shared_[i]});
      }
      if (by_another(reader, number_))
        fail(l, "writes shared memory at " + std::to_string(i - kReserved) +
                    " that another warp has read since the last barrier");
      writer = stamp(who);
    }
  }
  // After a store: what was there is there again.
  void check_repeated() {
    for (const auto& [l, i, before] : repeated_)
      if (shared_[i] != before) fail_repeated(l, i);
    repeated_.clear();
  }
  [[noreturn]] void fail_repeated(int l, uint32_t i) const {
    fail(l, "writes shared memory at " + std::to_string(i - kReserved) +
                " that another warp has written since the last barrier");
  }
  [[noreturn]] void fail_shared(int l, uint32_t place, unsigned bytes) const {
    const std::string text = "an access of " + std::to_string(bytes) + " bytes of shared memory at " +
                             std::to_string(int64_t{place} - kReserved);
    if (place % bytes) fail(l, text + ", a misaligned address");
    fail(l, text + ", outside of its " + std::to_string(shared_.size() - kReserved));
  }

  // Where words that a load takes were never written.
  void mark_unwritten(const Instruction& i, uint32_t mask, const uint32_t* places) {
    const int words = std::max(i.bytes / 4, 1);
    for (int word = 0; word < words; ++word) {
      uint32_t lanes = 0;
      EACH_OF(mask) {
        const uint32_t* const writers = &writers_[places[l] + 4 * word];
        for (int byte = 0; byte < std::min<int>(i.bytes, 4); ++byte) lanes |= uint32_t{writers[byte] == 0} << l;
      }
      uint32_t& unwritten = warp_->unwritten[i.to + word];
      unwritten = (unwritten & ~mask) | lanes;
      if (lanes != 0) warp_->has_unwritten = true;
    }
  }
  void store_unwritten(const Instruction& i, uint32_t mask, const uint32_t* places) {
    if (i.source[0].pool) return;
    for (int word = 0; word < std::max(i.bytes / 4, 1); ++word)
      EACH_OF(mask & warp_->unwritten[row_of(i.source[0].row, word)])
        std::fill_n(&writers_[places[l] + 4 * word], std::min<int>(i.bytes, 4), 0);
  }

  // The results of values that were never written were not written either. They may be computed with, as compilers and
  // unrolled loops do, but decide nothing, and reach neither an address nor global memory.
  [[gnu::noinline]] void follow_unwritten(const Instruction& i, uint32_t active, uint32_t mask) {
    Warp& warp = *warp_;
    uint32_t* const rows = warp.unwritten;
    const auto reject = [&](uint32_t lanes, const char* use) {
      EACH_OF(lanes & active) fail(l, std::string(use) + " shared memory that was not written");
    };
    const auto of_address = [&](const Address& address) {
      return rows[address.row] | rows[address.uniform] | (address.wide ? rows[row_of(address.row, 1)] : 0);
    };
    const auto of_rows = [&](const Source& source, int count) {
      uint32_t lanes = 0;
      for (int word = 0; word < count && !source.pool; ++word) lanes |= rows[row_of(source.row, word)];
      return lanes;
    };
    const uint32_t guard = warp.unwritten_predicates[i.guard.index];
    uint32_t predicates = guard;
    for (int p = 0; p < i.predicates; ++p) predicates |= warp.unwritten_predicates[i.predicate[p].index];
    uint32_t values = 0, pairs = 0;
    for (int s = 0; s < i.sources; ++s) {
      values |= of_rows(i.source[s], 1);
      if (!i.source[s].pool) pairs |= rows[i.source[s].high] & (i.op == Op::kImadWide && s < 2 ? 0 : kAll);
    }
    const int words = std::max(i.bytes / 4, 1);
    int results = 1;
    switch (i.op) {
      case Op::kNop: case Op::kMoveBarrier:
        return;
      case Op::kGlobalStore: case Op::kLocalStore: case Op::kGlobalAtomic: case Op::kSharedAtomic:
        for (int s = 0; s < i.sources; ++s) values |= of_rows(i.source[s], words);
        reject(predicates | ((values | of_address(i.address)) & mask), "stores what follows from");
        break;
      case Op::kSharedStore:
        reject(predicates | (of_address(i.address) & mask), "finds an address by");
        return;
      case Op::kStoreMatrices:
        for (int word = 0; word < i.variant; ++word) values |= rows[row_of(i.source[0].row, word)];
        reject(predicates | ((values | of_address(i.address)) & mask), "stores what follows from");
        return;
      case Op::kCopyToShared:
        reject(predicates | ((of_address(i.address) | of_address(i.second)) & mask), "finds an address by");
        return;
      case Op::kGlobalLoad: case Op::kSharedLoad: case Op::kLocalLoad: case Op::kLoadConstant: case Op::kSharedMatrices:
        reject(of_address(i.address) & mask, "finds an address by");
        values = 0, results = i.op == Op::kSharedMatrices ? i.variant : words;
        break;
      case Op::kBranch: case Op::kBranchDivergent: case Op::kBranchIndexed: case Op::kReturn: case Op::kExit:
      case Op::kReconverge: case Op::kConverge: case Op::kBreak: case Op::kWarpSync: case Op::kBarrier:
        reject(predicates | (values & mask), "decides by");
        return;
      case Op::kSelect: {
        const uint32_t which = read(i.predicate[0]);
        const auto of = [&](int s) { return of_rows(i.source[s], 1); };
        values = (which & of(0)) | (~which & of(1));
        break;
      }
      case Op::kVote: case Op::kMatch: case Op::kRedux: case Op::kToUniform:
        values = (values | predicates) & active ? kAll : 0;
        break;
      case Op::kMma:
        for (int s = 0; s < 3; ++s) values |= of_rows(i.source[s], s == 1 ? 2 : 4);
        values = values ? kAll : 0, results = 4;
        break;
      case Op::kGroupMma:
        for (int word = 0; word < 32; ++word) values |= rows[row_of(i.source[0].row, word)];
        values = values ? kAll : 0, results = 32;
        break;
      case Op::kImadWide: case Op::kImadHigh: case Op::kIadd64: case Op::kDadd: case Op::kDmul: case Op::kDfma: case Op::kDsetp:
        values |= pairs, results = 2;
        break;
      case Op::kIntToFloat: case Op::kFloatToInt: case Op::kFloatToFloat:
        if (i.from == Type::kU64 || i.from == Type::kS64 || i.from == Type::kF64) values |= pairs;
        if (i.type == Type::kU64 || i.type == Type::kS64 || i.type == Type::kF64) results = 2;
        break;
      case Op::kShuffle:
        values = rows[i.source[1].row] & (i.source[1].pool ? 0 : kAll);  // shuffle() adds its own
        break;
      default:
        break;
    }
    const uint32_t lanes = (values | predicates) & mask;
    for (int word = 0; word < results; ++word) rows[i.to + word] = (rows[i.to + word] & ~mask) | lanes;
    for (const uint8_t predicate : i.to_predicate) {
      uint32_t& unwritten = warp.unwritten_predicates[predicate];
      unwritten = (unwritten & ~mask) | lanes;
    }
    std::memset(&rows[kNowhere], 0, 4 * sizeof(*rows));
    warp.unwritten_predicates[kNoPredicate] = 0;
  }

  void load_matrices(const Instruction& i, uint32_t mask) {
    if (mask != kAll) fail(__builtin_ctz(~mask), "matrices are loaded by a whole warp");
    uint32_t places[kLanes];
    shared(i.address, 16, i.variant == 4 ? kAll : (1u << 8 * i.variant) - 1, places, Access::kRead);
    for (int matrix = 0; matrix < i.variant; ++matrix) {
      Row result;
      EACH {
        const auto element = [&](int row, int column) {
          uint16_t value;
          std::memcpy(&value, shared_.data() + places[8 * matrix + row] + 2 * column, 2);
          return uint32_t{value};
        };
        const int row = l / 4, column = l % 4 * 2;
        result.v[l] = i.wraps ? element(column, row) | element(column + 1, row) << 16
                              : element(row, column) | element(row, column + 1) << 16;
      }
      write(i.to + matrix, result, mask);
    }
  }

  void store_matrices(const Instruction& i, uint32_t mask) {
    if (mask != kAll) fail(__builtin_ctz(~mask), "matrices are stored by a whole warp");
    uint32_t places[kLanes];
    shared(i.address, 16, i.variant == 4 ? kAll : (1u << 8 * i.variant) - 1, places, Access::kWrite);
    for (int matrix = 0; matrix < i.variant; ++matrix) {
      const uint32_t* from = warp_->rows[row_of(i.source[0].row, matrix)].v;
      EACH for (int half = 0; half < 2; ++half) {
        const int row = i.wraps ? l % 4 * 2 + half : l / 4, column = i.wraps ? l / 4 : l % 4 * 2 + half;
        const auto value = static_cast<uint16_t>(from[l] >> 16 * half);
        std::memcpy(shared_.data() + places[8 * matrix + row] + 2 * column, &value, 2);
      }
    }
    check_repeated();
  }

  void local(const Instruction& i, uint32_t mask, char** places) {
    const uint32_t *row = warp_->rows[i.address.row].v, *uniform = warp_->rows[i.address.uniform].v;
    EACH_OF(mask) {
      const uint32_t place = row[l] + uniform[l] + i.address.offset;
      if (place % i.bytes) fail(l, "a misaligned address of local memory");
      if (uint64_t{place} + i.bytes > kernel_.frame)
        fail(l, "an access of local memory at " + std::to_string(place) + ", outside of its " +
                    std::to_string(kernel_.frame));
      places[l] = local_.data() + (number_ * kLanes + l) * kernel_.frame + place;
    }
  }

  // Of d = a @ b + c, with a [64, 16], b [16, 64], c and d [64, 64], the 16 rows of this one of four warps. PTX says of
  // wgmma how d lies in the registers, and how descriptors tell where in shared memory a and b lie: a by rows of 16, b by
  // rows of 64, both in groups of 8 rows of 128 bytes, of which an address's bits 4 to 6 are swizzled by its bits 7 to 9.
  // The product is there at once: a kernel that does not wait for it is not found out.
  void multiply_in_group(const Instruction& i, uint32_t mask) {
    if (mask != kAll) fail(__builtin_ctz(~mask), "a product is made by whole warps");
    struct Matrix {
      uint32_t begin, stride;  // stride: between groups, in bytes
    };
    const auto matrix_of = [&](int number) {
      const auto word = [&](int at) { return warp_->rows[row_of(i.address.uniform, 2 * number + at)].v[0]; };
      if (word(1) >> 30 != 1 || (word(1) >> 17 & 7)) fail(0, "this layout of a matrix is not known");
      return Matrix{(word(0) & 0x3fff) << 4, (word(1) & 0x3fff) << 4};
    };
    const auto element = [&](const Matrix& matrix, int row, int column) {
      uint32_t place = matrix.begin + row / 8 * matrix.stride + row % 8 * 128 + 2 * column;
      place ^= (place >> 7 & 7) << 4;
      if (place < kReserved || place + 2 > shared_.size()) fail_shared(0, place, 2);
      for (uint32_t byte = place; byte < place + 2; ++byte) check_shared(0, byte, Access::kRead);
      uint16_t bits;
      std::memcpy(&bits, shared_.data() + place, 2);
      return i.brain ? float_of(uint32_t{bits} << 16) : float_of_half(bits);
    };
    const Matrix left = matrix_of(0), right = matrix_of(1);
    float a[16][16], b[16][64];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) a[row][k] = element(left, number_ % 4 * 16 + row, k);
      for (int column = 0; column < 64; ++column) b[k][column] = element(right, k, column);
    }
    for (int word = 0; word < 32; ++word) {
      Row result;
      EACH {
        const int row = l / 4 + word / 2 % 2 * 8, column = word / 4 * 8 + l % 4 * 2 + word % 2;
        float sum = float_of(warp_->rows[row_of(i.source[0].row, word)].v[l]);
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        result.v[l] = bits_of(sum);
      }
      write(i.to == kNowhere ? i.to : i.to + word, result, mask);
    }
  }

  // d = a @ b + c; a [16, 16], b [16, 8], c and d [16, 8], laid out over the lanes as PTX says of mma.m16n8k16.
  void multiply_matrices(const Instruction& i, uint32_t mask) {
    if (mask != kAll) fail(__builtin_ctz(~mask), "a product is made by a whole warp");
    float left[16][16], right[16][8];
    const auto halves_of = [&](int source, int number, int l, float& low, float& high) {
      const uint32_t bits = warp_->rows[row_of(i.source[source].row, number)].v[l];
      low = i.brain ? float_of(bits << 16) : float_of_half(bits);
      high = i.brain ? float_of(bits & 0xffff0000) : float_of_half(bits >> 16);
    };
    EACH {
      const int g = l / 4, t = l % 4 * 2;
      for (int r = 0; r < 4; ++r)
        halves_of(0, r, l, left[g + r % 2 * 8][t + r / 2 * 8], left[g + r % 2 * 8][t + 1 + r / 2 * 8]);
      for (int r = 0; r < 2; ++r) halves_of(1, r, l, right[t + 8 * r][g], right[t + 1 + 8 * r][g]);
    }
    Row results[4];
    EACH {
      const int g = l / 4, t = l % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        const int row = g + r / 2 * 8, column = t + r % 2;
        double sum = float_of(warp_->rows[row_of(i.source[2].row, r)].v[l]);
        for (int k = 0; k < 16; ++k) sum += double{left[row][k]} * right[k][column];
        results[r].v[l] = bits_of(static_cast<float>(sum));
      }
    }
    for (int r = 0; r < 4; ++r) write(i.to + r, results[r], mask);
  }

  const Kernel& kernel_;
  const Launch& launch_;
  const Allocations& allocations_;
  const bool counts_sectors_;
  Counts& counts_;
  const unsigned threads_;
  std::vector<Warp> warps_;
  std::vector<char> shared_;
  std::vector<uint32_t> writers_, readers_;
  struct Repeated {
    int lane;
    uint32_t place;
    char before;
  };
  std::vector<Repeated> repeated_;  // bytes that the present store writes after another warp
  std::vector<char> local_;
  std::vector<const Allocations::Range*> hints_;  // where each instruction was last
  std::vector<Row> pool_;
  std::vector<std::string> banks_;
  std::unordered_map<uint64_t, Page> pages_;
  Page* last_page_ = nullptr;
  uint64_t last_page_number_ = 0;

  Size block_{};
  bool forward_ = true;
  uint32_t epoch_ = 1;
  uint32_t barrier_ones_ = 0, barrier_threads_ = 0, results_ones_ = 0, results_threads_ = 0;
  uint8_t reduction_ = 0, results_kind_ = 0;

  Warp* warp_ = nullptr;  // the running one
  unsigned number_ = 0;
  uint32_t pc_ = 0;
  const uint32_t* base_[2] = {};
};

}  // namespace

std::string text_of(Size size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
}

void Allocations::add(uint64_t begin, uint64_t bytes) {
  if (bytes != 0) ranges_.push_back({begin, begin + bytes});
}

const Allocations::Range* Allocations::find(uint64_t address, uint64_t bytes) const {
  const Range* nearest = nullptr;
  uint64_t least = ~uint64_t{0};
  for (const Range& range : ranges_) {
    if (address >= range.begin && address + bytes <= range.end) return &range;
    const uint64_t inside = std::min(address, range.end - 1);
    const uint64_t distance = address < range.begin ? range.begin - address : address - inside;
    if (distance < least) least = distance, nearest = &range;
  }
  return nearest;
}

void set_error(Error error) { wanted_error = error; }

void run(
    const Kernel& kernel, const Launch& launch, const Allocations& allocations, bool counts_sectors, Counts& counts) {
  counts.executed.resize(kernel.code.size());
  counts.requests.resize(kernel.code.size());
  counts.sectors.resize(kernel.code.size());
  counts.threads = launch.block.x * launch.block.y * launch.block.z;
  counts.shared = kernel.shared + launch.shared;
  Machine(kernel, launch, allocations, counts_sectors, counts).run();
}

}  // namespace sass
