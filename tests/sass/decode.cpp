// From the text of an instruction to what emulator.cpp runs. What is not known is an error, never left out.
#include <cxxabi.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "instruction.h"

namespace sass {
namespace {

using std::string_view;

struct Meaning {
  Op op;
  Class kind;
};

// Those of the uniform datapath have the same names with a U before them.
const std::map<string_view, Meaning> kMeanings = {
    {"NOP", {Op::kNop, Class::kControl}},
    {"NANOSLEEP", {Op::kNop, Class::kControl}},
    {"PREEXIT", {Op::kNop, Class::kControl}},  // of programmatic dependent launches: here one ends before the next
    {"ACQBULK", {Op::kNop, Class::kControl}},
    {"YIELD", {Op::kNop, Class::kControl}},
    {"DEPBAR", {Op::kNop, Class::kControl}},
    {"LDGDEPBAR", {Op::kNop, Class::kControl}},
    {"MEMBAR", {Op::kNop, Class::kControl}},
    {"ERRBAR", {Op::kNop, Class::kControl}},
    {"CGAERRBAR", {Op::kNop, Class::kControl}},
    {"CCTL", {Op::kNop, Class::kControl}},
    {"ENDCOLLECTIVE", {Op::kNop, Class::kControl}},
    {"MOV", {Op::kMove, Class::kInteger}},
    {"IADD3", {Op::kIadd3, Class::kInteger}},
    {"VIADD", {Op::kIadd3, Class::kInteger}},
    {"IMAD", {Op::kImad, Class::kInteger}},
    {"LEA", {Op::kLea, Class::kInteger}},
    {"SHF", {Op::kShift, Class::kInteger}},
    {"LOP3", {Op::kLop3, Class::kInteger}},
    {"PLOP3", {Op::kPlop3, Class::kInteger}},
    {"SEL", {Op::kSelect, Class::kInteger}},
    {"ISETP", {Op::kIsetp, Class::kInteger}},
    {"VIMNMX", {Op::kIminmax, Class::kInteger}},
    {"VIMNMX3", {Op::kIminmax, Class::kInteger}},
    {"VIADDMNMX", {Op::kIminmax, Class::kInteger}},
    {"IABS", {Op::kIabs, Class::kInteger}},
    {"PRMT", {Op::kPrmt, Class::kInteger}},
    {"POPC", {Op::kPopc, Class::kSpecial}},
    {"FLO", {Op::kFlo, Class::kSpecial}},
    {"SGXT", {Op::kSignExtend, Class::kInteger}},
    {"BREV", {Op::kBrev, Class::kSpecial}},
    {"FADD", {Op::kFadd, Class::kFloat}},
    {"FMUL", {Op::kFmul, Class::kFloat}},
    {"FFMA", {Op::kFfma, Class::kFloat}},
    {"FSEL", {Op::kSelect, Class::kFloat}},
    {"FSET", {Op::kFset, Class::kFloat}},
    {"FSETP", {Op::kFsetp, Class::kFloat}},
    {"FMNMX", {Op::kFminmax, Class::kFloat}},
    {"FCHK", {Op::kFchk, Class::kSpecial}},
    {"MUFU", {Op::kMufu, Class::kSpecial}},
    {"FRND", {Op::kFround, Class::kSpecial}},
    {"F2I", {Op::kFloatToInt, Class::kSpecial}},
    {"I2F", {Op::kIntToFloat, Class::kSpecial}},
    {"I2FP", {Op::kIntToFloat, Class::kFloat}},
    {"F2F", {Op::kFloatToFloat, Class::kSpecial}},
    {"F2FP", {Op::kPackFloats, Class::kHalf}},
    {"HADD2", {Op::kHalfAdd, Class::kHalf}},
    {"HMUL2", {Op::kHalfMul, Class::kHalf}},
    {"HFMA2", {Op::kHalfFma, Class::kHalf}},
    {"HSETP2", {Op::kHalfSetp, Class::kHalf}},
    {"VHMNMX", {Op::kHalfMinmax, Class::kHalf}},
    {"HMNMX2", {Op::kHalfMinmax, Class::kHalf}},
    {"DADD", {Op::kDadd, Class::kDouble}},
    {"DMUL", {Op::kDmul, Class::kDouble}},
    {"DFMA", {Op::kDfma, Class::kDouble}},
    {"DSETP", {Op::kDsetp, Class::kDouble}},
    {"SHFL", {Op::kShuffle, Class::kWarp}},
    {"VOTE", {Op::kVote, Class::kWarp}},
    {"MATCH", {Op::kMatch, Class::kWarp}},
    {"REDUX", {Op::kRedux, Class::kWarp}},
    {"P2R", {Op::kPredicatesToRegister, Class::kInteger}},
    {"R2P", {Op::kRegisterToPredicates, Class::kInteger}},
    {"S2R", {Op::kSpecial, Class::kInteger}},
    {"CS2R", {Op::kSpecial, Class::kInteger}},
    {"S2UR", {Op::kSpecial, Class::kInteger}},
    {"R2UR", {Op::kToUniform, Class::kInteger}},
    {"LDC", {Op::kLoadConstant, Class::kConstant}},
    {"LDG", {Op::kGlobalLoad, Class::kGlobalLoad}},
    {"LD", {Op::kGlobalLoad, Class::kGlobalLoad}},
    {"STG", {Op::kGlobalStore, Class::kGlobalStore}},
    {"ST", {Op::kGlobalStore, Class::kGlobalStore}},
    {"ATOMG", {Op::kGlobalAtomic, Class::kGlobalAtomic}},
    {"REDG", {Op::kGlobalAtomic, Class::kGlobalAtomic}},
    {"RED", {Op::kGlobalAtomic, Class::kGlobalAtomic}},
    {"LDS", {Op::kSharedLoad, Class::kSharedLoad}},
    {"STS", {Op::kSharedStore, Class::kSharedStore}},
    {"ATOMS", {Op::kSharedAtomic, Class::kSharedAtomic}},
    {"LDSM", {Op::kSharedMatrices, Class::kSharedLoad}},
    {"STSM", {Op::kStoreMatrices, Class::kSharedStore}},
    {"LDL", {Op::kLocalLoad, Class::kLocal}},
    {"STL", {Op::kLocalStore, Class::kLocal}},
    {"LDGSTS", {Op::kCopyToShared, Class::kGlobalLoad}},
    {"HGMMA", {Op::kGroupMma, Class::kTensor}},
    {"WARPGROUP", {Op::kNop, Class::kBarrier}},
    {"HMMA", {Op::kMma, Class::kTensor}},
    {"BAR", {Op::kBarrier, Class::kBarrier}},
    {"B2R", {Op::kBarrierResult, Class::kBarrier}},
    {"BRA", {Op::kBranch, Class::kControl}},
    {"BRX", {Op::kBranchIndexed, Class::kControl}},
    {"CALL", {Op::kCall, Class::kControl}},
    {"RET", {Op::kReturn, Class::kControl}},
    {"EXIT", {Op::kExit, Class::kControl}},
    {"BSSY", {Op::kReconverge, Class::kControl}},
    {"BSYNC", {Op::kConverge, Class::kControl}},
    {"BREAK", {Op::kBreak, Class::kControl}},
    {"BMOV", {Op::kMoveBarrier, Class::kControl}},
    {"WARPSYNC", {Op::kWarpSync, Class::kControl}},
    {"BPT", {Op::kTrap, Class::kControl}},
};

const std::map<string_view, Compare> kCompares = {
    {"F", Compare::kFalse}, {"LT", Compare::kLt}, {"EQ", Compare::kEq}, {"LE", Compare::kLe},
    {"GT", Compare::kGt}, {"NE", Compare::kNe}, {"GE", Compare::kGe}, {"NUM", Compare::kNum},
    {"NAN", Compare::kNan}, {"LTU", Compare::kLtu}, {"EQU", Compare::kEqu}, {"LEU", Compare::kLeu},
    {"GTU", Compare::kGtu}, {"NEU", Compare::kNeu}, {"GEU", Compare::kGeu}, {"T", Compare::kTrue},
};
const std::map<string_view, Type> kTypes = {
    {"U8", Type::kU8}, {"S8", Type::kS8}, {"U16", Type::kU16}, {"S16", Type::kS16}, {"U32", Type::kU32},
    {"S32", Type::kS32}, {"U64", Type::kU64}, {"S64", Type::kS64}, {"F16", Type::kF16}, {"BF16", Type::kBF16},
    {"F32", Type::kF32}, {"F64", Type::kF64},
};
const std::map<string_view, Atomic> kAtomics = {
    {"ADD", Atomic::kAdd}, {"MIN", Atomic::kMin}, {"MAX", Atomic::kMax}, {"INC", Atomic::kInc}, {"DEC", Atomic::kDec},
    {"AND", Atomic::kAnd}, {"OR", Atomic::kOr}, {"XOR", Atomic::kXor}, {"EXCH", Atomic::kExch}, {"CAS", Atomic::kCas},
};
const std::map<string_view, uint8_t> kFunctions = {
    {"RCP", 0}, {"RSQ", 1}, {"LG2", 2}, {"EX2", 3}, {"SIN", 4}, {"COS", 5}, {"SQRT", 6}, {"TANH", 7}, {"RCP64H", 8},
    {"RSQ64H", 9},
};
const std::map<string_view, uint8_t> kSpecials = {
    {"SRZ", 0}, {"SR_TID.X", 1}, {"SR_TID.Y", 2}, {"SR_TID.Z", 3}, {"SR_CTAID.X", 4}, {"SR_CTAID.Y", 5},
    {"SR_CTAID.Z", 6}, {"SR_LANEID", 7}, {"SR_CgaCtaId", 8}, {"SR_EQMASK", 9}, {"SR_LTMASK", 10}, {"SR_LEMASK", 11},
    {"SR_GTMASK", 12}, {"SR_GEMASK", 13},
};

[[noreturn]] void unknown(const std::string& what) { throw std::runtime_error("unknown " + what); }

// An instruction in its parts.
class Decoder {
 public:
  Decoder(Kernel& kernel, std::map<std::pair<uint8_t, uint32_t>, uint32_t>& rows, uint32_t word, string_view text)
      : kernel_(kernel), rows_(rows), word_(word), text_(text) {}

  Instruction decode() {
    string_view rest = text_;
    if (rest.front() == '@') {
      const size_t end = rest.find(' ');
      result_.guard = predicate(rest.substr(1, end - 1));
      rest.remove_prefix(end + 1);
    }
    const size_t end = std::min(rest.find(' '), rest.size());
    split(rest.substr(0, end), '.', modifiers_);
    if (end < rest.size()) split_arguments(rest.substr(end + 1));
    string_view name = modifiers_.front();
    modifiers_.erase(modifiers_.begin());
    auto found = kMeanings.find(name);
    if (found == kMeanings.end() && name.front() == 'U') {
      result_.uniform = true;
      found = kMeanings.find(name.substr(1));
    }
    if (name == "UP2UR") found = kMeanings.find("P2R"), result_.uniform = true;
    if (name == "VOTEU") found = kMeanings.find("VOTE"), result_.uniform = true;
    if (name == "S2UR") result_.uniform = true;
    if (found == kMeanings.end()) unknown("instruction");
    result_.op = found->second.op, result_.kind = found->second.kind;
    name_ = name;
    fill();
    if (!arguments_.empty()) unknown("operands");
    for (const string_view modifier : modifiers_)
      if (modifier != "") unknown("modifier ." + std::string(modifier));
    return result_;
  }

 private:
  bool take(string_view modifier) {
    const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
    if (found == modifiers_.end()) return false;
    modifiers_.erase(found);
    return true;
  }
  template <typename T>
  bool take(const std::map<string_view, T>& values, T& to) {
    for (size_t i = 0; i < modifiers_.size(); ++i) {
      const auto found = values.find(modifiers_[i]);
      if (found == values.end()) continue;
      to = found->second;
      modifiers_.erase(modifiers_.begin() + i);
      return true;
    }
    return false;
  }

  static void split(string_view text, char by, std::vector<string_view>& to) {
    for (size_t at = 0; at <= text.size();) {
      const size_t end = std::min(text.find(by, at), text.size());
      to.push_back(text.substr(at, end - at));
      at = end + 1;
    }
  }
  void split_arguments(string_view text) {
    split(text, ',', arguments_);
    for (string_view& argument : arguments_) {
      while (!argument.empty() && argument.front() == ' ') argument.remove_prefix(1);
      while (!argument.empty() && argument.back() == ' ') argument.remove_suffix(1);
    }
  }

  static bool digits(string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
  }
  static bool is_predicate(string_view text) {
    if (!text.empty() && text.front() == '!') text.remove_prefix(1);
    if (!text.empty() && text.front() == 'U') text.remove_prefix(1);
    return text == "PT" || (text.size() == 2 && text[0] == 'P' && digits(text.substr(1)));
  }
  static PredicateSource predicate(string_view text) {
    PredicateSource result{};
    if (text.front() == '!') result.inverted = true, text.remove_prefix(1);
    const uint8_t first = text.front() == 'U' ? kUniformPredicates : 0;
    if (first) text.remove_prefix(1);
    result.index = first + (text == "PT" ? 7 : text[1] - '0');
    return result;
  }
  static uint8_t predicate_to_write(string_view text) {
    const uint8_t index = predicate(text).index;
    return index % 8 == 7 ? uint8_t{kNoPredicate} : index;
  }
  // Of R5, RZ, UR6 or URZ; false where it is none.
  static bool is_register(string_view text, uint16_t& row) {
    const bool uniform = text.substr(0, 2) == "UR";
    if (!uniform && text.substr(0, 1) != "R") return false;
    text.remove_prefix(uniform ? 2 : 1);
    if (text == "Z") return row = uniform ? kUniformZero : kZero, true;
    if (!digits(text)) return false;
    row = (uniform ? kUniform : 0) + std::atoi(std::string(text).c_str());
    return true;
  }
  static uint16_t next(uint16_t row, int by = 1) {
    return row == kZero || row == kUniformZero || row == kNowhere ? row : row + by;
  }
  static uint16_t to_write(uint16_t row) { return row == kZero || row == kUniformZero ? uint16_t{kNowhere} : row; }

  static int64_t integer(string_view text) {
    const bool negative = !text.empty() && text.front() == '-';
    if (negative) text.remove_prefix(1);
    const bool hexadecimal = text.substr(0, 2) == "0x";
    if (hexadecimal) text.remove_prefix(2);
    uint64_t value = 0;
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value, hexadecimal ? 16 : 10);
    if (parsed.ec != std::errc{} || parsed.ptr != text.data() + text.size()) unknown("operand " + std::string(text));
    return negative ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
  }

  uint32_t row_of_pool(uint8_t bank, uint32_t value) {
    const auto [found, fresh] = rows_.try_emplace({bank, value}, static_cast<uint32_t>(kernel_.constants.size()));
    if (fresh) kernel_.constants.push_back({found->second, bank, value});
    return found->second;
  }

  enum Numbers { kIntegers, kFloats, kDoubles, kHalves };

  Source source(string_view text, Numbers numbers) {
    Source result;
    bool complement = false;
    for (;; text.remove_prefix(1)) {
      if (text.front() == '-' && !digits(text.substr(1, 1)) && text.find("INF") == text.npos &&
          text.find("QNAN") == text.npos) {
        result.negated = true;
      } else if (text.front() == '~') {
        complement = true;
      } else {
        break;
      }
    }
    if (text.front() == '|') {
      result.absolute = true;
      text.remove_prefix(1);
      text = text.substr(0, text.find('|'));
    }
    const size_t dot = text.find('.');
    uint16_t row;
    if (is_register(text.substr(0, dot), row)) {
      result.row = row, result.high = next(row);
      if (dot != text.npos) suffix(text.substr(dot + 1), result);
    } else if (text.substr(0, 2) == "c[") {
      const auto [bank, at] = constant(text);
      result.pool = true;
      result.row = row_of_pool(bank, at), result.high = row_of_pool(bank, at + 4);
      const size_t close = text.rfind(']');
      if (close + 1 < text.size()) suffix(text.substr(close + 2), result);
    } else {
      result.pool = true;
      if (numbers == kIntegers) {
        const int64_t value = integer(text);
        result.row = row_of_pool(kImmediate, static_cast<uint32_t>(value));
        result.high = row_of_pool(kImmediate, value < 0 ? kAll : 0);
      } else if (numbers == kDoubles) {
        result.row = row_of_pool(kImmediate, 0), result.high = row_of_pool(kImmediate, word_);
      } else {
        result.row = row_of_pool(kImmediate, word_);
      }
    }
    result.modified = result.negated || result.absolute || complement;
    if (numbers == kIntegers) {
      if (result.negated) result.flip = kAll, result.add = 1;
      if (complement) result.flip = kAll;
    } else {
      const uint32_t sign = numbers == kHalves ? 0x80008000u : 0x80000000u;
      if (result.absolute) result.keep = ~sign;
      if (result.negated) result.flip = sign;
    }
    return result;
  }
  static void suffix(string_view text, Source& source) {
    if (text == "H0_H0") {
      source.half = 1;
    } else if (text == "H1_H1") {
      source.half = 2;
    } else if (text != "H1_H0" && text != "64") {
      unknown("suffix ." + std::string(text));
    }
  }
  // c[0x0][0x210]
  static std::pair<uint8_t, uint32_t> constant(string_view text) {
    const size_t middle = text.find("][");
    const uint8_t bank = integer(text.substr(2, middle - 2));
    return {bank, static_cast<uint32_t>(integer(text.substr(middle + 2, text.rfind(']') - middle - 2)))};
  }

  // desc[UR4][R2.64+0x10], [R2.X4+UR5+-0x4], [UR4] or what is in the second pair of brackets of a constant
  Address address(string_view text, bool wide = false) {
    const size_t open = text.rfind('[');
    text = text.substr(open + 1, text.rfind(']') - open - 1);
    Address result;
    result.wide = wide;
    for (size_t at = 0; at < text.size();) {
      size_t end = text.find('+', at);
      if (end == text.npos) end = text.size();
      string_view part = text.substr(at, end - at);
      at = end + 1;
      const size_t dot = part.find('.');
      uint16_t row;
      if (is_register(part.substr(0, dot), row)) {
        const string_view how = dot == part.npos ? string_view{} : part.substr(dot + 1);
        if (row >= kUniform) {
          result.uniform = row;
        } else {
          result.row = row;
        }
        if (how == "64") {
          result.wide = true;
        } else if (how == "X4" || how == "X8" || how == "X16") {
          result.scale = how == "X4" ? 2 : how == "X8" ? 3 : 4;
        } else if (how != "" && how != "U32") {
          unknown("address " + std::string(text));
        }
        if (how == "U32") result.wide = false;
      } else {
        result.offset += static_cast<int32_t>(integer(part));
      }
    }
    return result;
  }

  // Results first: a register, predicates, in any order; then sources; then the predicates that are read.
  void operands(Numbers numbers, bool has_register = true, size_t most_results = 2) {
    size_t at = 0;
    bool wants_register = has_register;
    for (; at < arguments_.size(); ++at) {
      uint16_t row;
      if (is_predicate(arguments_[at]) && result_.results < most_results) {
        result_.to_predicate[result_.results++] = predicate_to_write(arguments_[at]);
      } else if (wants_register && is_register(arguments_[at], row)) {
        result_.to = to_write(row), result_.to_high = next(result_.to);
        wants_register = false;
      } else {
        break;
      }
    }
    for (; at < arguments_.size() && !is_predicate(arguments_[at]); ++at) add_source(arguments_[at], numbers);
    for (; at < arguments_.size(); ++at) {
      if (!is_predicate(arguments_[at])) unknown("operands");
      add_predicate(arguments_[at]);
    }
    arguments_.clear();
  }
  void add_source(string_view text, Numbers numbers) {
    if (result_.sources == 3) unknown("operands");
    result_.source[result_.sources++] = source(text, numbers);
  }
  void add_predicate(string_view text) {
    if (result_.predicates == 3) unknown("operands");
    result_.predicate[result_.predicates++] = predicate(text);
  }

  void compare() {
    if (!take(kCompares, result_.compare)) unknown("comparison");
    if (take("OR")) {
      result_.combine = Combine::kOr;
    } else if (take("XOR")) {
      result_.combine = Combine::kXor;
    } else {
      take("AND");
    }
  }
  void arithmetic() {
    result_.ftz = take("FTZ");
    result_.saturates = take("SAT");
    if (take("RM") || take("FLOOR")) result_.round = Round::kDown;
    if (take("RP") || take("CEIL")) result_.round = Round::kUp;
    if (take("RZ") || take("TRUNC")) result_.round = Round::kZero;
    take("RN");
  }
  void memory() {
    for (const char* word : {"E", "CONSTANT", "STRONG", "GPU", "SYS", "CTA", "SM", "WEAK", "EF", "EL", "LU", "NA",
                             "LTC64B", "LTC128B", "LTC256B", "PRIVATE", "EN"})
      take(word);
    result_.bytes = take("128") ? 16 : take("64") ? 8 : 4;
    if (take("U16") || take("16")) result_.bytes = 2, result_.type = Type::kU16;
    if (take("S16")) result_.bytes = 2, result_.type = Type::kS16;
    if (take("U8") || take("8")) result_.bytes = 1, result_.type = Type::kU8;
    if (take("S8")) result_.bytes = 1, result_.type = Type::kS8;
    take("32");
  }
  uint32_t target(string_view text) {
    const int64_t at = integer(text);
    if (at % 16) unknown("target");
    return static_cast<uint32_t>(at / 16);
  }
  uint32_t barrier(string_view text) {
    if (text.front() != 'B' || !digits(text.substr(1))) unknown("barrier");
    return std::atoi(std::string(text.substr(1)).c_str());
  }

  void fill() {
    Instruction& i = result_;
    switch (i.op) {
      case Op::kNop:
        modifiers_.clear(), arguments_.clear();
        break;
      case Op::kMove:
        operands(kIntegers);
        break;
      case Op::kIadd3:
        i.extended = take("X"), i.packed = take("16x2");
        if (take("64")) i.op = Op::kIadd64;
        operands(kIntegers);
        break;
      case Op::kImad:
        for (const char* spelling : {"MOV", "IADD", "SHL"}) take(spelling);
        i.extended = take("X");
        i.type = take("U32") ? Type::kU32 : Type::kS32;
        if (take("WIDE")) i.op = Op::kImadWide;
        if (take("HI")) i.op = Op::kImadHigh;
        operands(kIntegers);
        if (i.op == Op::kImad && !i.extended && is_zero(i.source[0])) i.op = Op::kMove, i.source[0] = i.source[2];
        break;
      case Op::kLea:
        i.extended = take("X");
        i.high = take("HI");
        i.wraps = take("SX32");  // the low half's sign is the high half
        if (i.high) i.op = Op::kLeaHigh;
        lea();
        break;
      case Op::kShift:
        i.left = take("L");
        if (!i.left && !take("R")) unknown("shift");
        i.wraps = take("W");
        i.high = take("HI");
        if (!take(kTypes, i.type)) unknown("shift");
        operands(kIntegers);
        break;
      case Op::kLop3:
        take("LUT");
        i.any = !take("PAND");
        i.immediate = static_cast<uint32_t>(integer(without(arguments_.size() - 2)));
        operands(kIntegers);
        break;
      case Op::kPlop3:
        take("LUT");
        i.bank = static_cast<uint8_t>(integer(without(arguments_.size() - 1)));
        i.immediate = static_cast<uint32_t>(integer(without(arguments_.size() - 1)));
        operands(kIntegers, false);
        break;
      case Op::kSelect:
        operands(name_ == "FSEL" ? kFloats : kIntegers, true, 0);
        break;
      case Op::kIsetp:
        compare();
        i.extended = take("EX");
        i.type = take("U32") ? Type::kU32 : Type::kS32;
        operands(kIntegers, false);
        break;
      case Op::kIminmax:
        i.type = take("U32") ? Type::kU32 : Type::kS32;
        if (take("U16x2")) i.type = Type::kU32, i.packed = true;
        if (take("S16x2")) i.packed = true;
        take("S32");
        i.variant = name_ == "VIADDMNMX" ? 1 : name_ == "VIMNMX3" ? 2 : 0;
        operands(kIntegers);
        break;
      case Op::kIabs: case Op::kPopc: case Op::kBrev: case Op::kToUniform:
        operands(kIntegers);
        break;
      case Op::kFlo:
        i.high = take("SH");
        if (!take("U32")) i.type = Type::kS32;
        operands(kIntegers);
        break;
      case Op::kPrmt:
        operands(kIntegers);
        break;
      case Op::kSignExtend:
        i.type = take("U32") ? Type::kU32 : Type::kS32;
        operands(kIntegers);
        break;
      case Op::kHalfSetp:
        compare();
        i.brain = take("BF16_V2");
        operands(kHalves, false);
        break;
      case Op::kFadd: case Op::kFmul: case Op::kFfma: case Op::kFround:
        arithmetic();
        if (result_.op == Op::kFmul) result_.variant = take("D2");  // half of the product
        operands(kFloats);
        break;
      case Op::kFset:
        if (!take("BF")) unknown("result");  // 1 or 0
        compare();
        operands(kFloats, true, 0);
        break;
      case Op::kFsetp:
        compare();
        i.ftz = take("FTZ");
        operands(kFloats, false);
        break;
      case Op::kFminmax:
        i.ftz = take("FTZ");
        i.any = take("NAN");
        i.wraps = take("XORSIGN");
        operands(kFloats);
        break;
      case Op::kFchk:
        take("DIVIDE");
        operands(kFloats, false, 1);
        break;
      case Op::kMufu:
        if (!take(kFunctions, i.variant)) unknown("function");
        operands(kFloats);
        break;
      case Op::kFloatToInt:
        i.nan_to_zero = take("NTZ");
        arithmetic();
        i.type = Type::kS32, i.from = Type::kF32;
        conversion();
        operands(i.from == Type::kF64 ? kDoubles : kFloats);
        break;
      case Op::kIntToFloat:
        arithmetic();
        i.type = Type::kF32, i.from = Type::kS32;
        conversion();
        operands(kIntegers);
        break;
      case Op::kFloatToFloat:
        arithmetic();
        i.type = Type::kF32, i.from = Type::kF32;
        conversion();
        operands(i.from == Type::kF64 ? kDoubles : kFloats);
        break;
      case Op::kPackFloats:
        i.type = take("BF16") ? Type::kBF16 : Type::kF16;
        take("F16"), take("PACK_AB"), take("F32");
        arithmetic();
        i.saturates = take("RELU");  // at 0
        operands(kFloats);
        break;
      case Op::kHalfAdd: case Op::kHalfMul: case Op::kHalfFma: case Op::kHalfMinmax:
        take("MMA");
        i.brain = take("BF16_V2");
        if (i.op == Op::kHalfAdd && take("F32")) i.op = Op::kHalfToFloat;
        i.any = take("NAN");
        i.saturates = take("SAT");
        halves();
        break;
      case Op::kDadd: case Op::kDmul: case Op::kDfma:
        arithmetic();
        operands(kDoubles);
        break;
      case Op::kDsetp:
        i.variant = take("MAX");
        if (i.variant == 0) compare();
        take("AND");
        operands(kDoubles, false);
        break;
      case Op::kShuffle:
        i.variant = take("IDX") ? 0 : take("UP") ? 1 : take("DOWN") ? 2 : take("BFLY") ? 3 : 4;
        if (i.variant == 4) unknown("shuffle");
        operands(kIntegers, true, 1);
        break;
      case Op::kVote:
        i.any = take("ANY");
        if (!i.any && !take("ALL")) unknown("vote");
        add_predicate(without(arguments_.size() - 1));
        operands(kIntegers);
        break;
      case Op::kMatch:
        i.any = take("ANY");
        if (!i.any && !take("ALL")) unknown("match");
        i.bytes = take("U64") ? 8 : 4;
        operands(kIntegers);
        break;
      case Op::kRedux:
        i.type = take("S32") ? Type::kS32 : Type::kU32;
        i.atomic = Atomic::kAnd;
        if (take("SUM")) i.atomic = Atomic::kAdd;
        take(kAtomics, i.atomic);
        operands(kIntegers);
        break;
      case Op::kPredicatesToRegister:
        if (without(1) != (i.uniform ? "UPR" : "PR")) unknown("operands");
        operands(kIntegers);
        break;
      case Op::kRegisterToPredicates:
        if (without(0) != "PR") unknown("operands");
        operands(kIntegers, false);
        break;
      case Op::kSpecial: {
        const auto found = kSpecials.find(without(1));
        if (found == kSpecials.end()) unknown("special register");
        i.variant = found->second;
        i.bytes = name_ == "CS2R" && !take("32") ? 8 : 4;
        operands(kIntegers);
        break;
      }
      case Op::kLoadConstant: {
        memory();
        const string_view from = without(1);
        i.bank = static_cast<uint8_t>(integer(from.substr(2, from.find("][") - 2)));
        i.address = address(from);
        operands(kIntegers);
        break;
      }
      case Op::kGlobalLoad: case Op::kSharedLoad: case Op::kLocalLoad:
        memory();
        i.address = address(without(arguments_.size() - 1), i.op == Op::kGlobalLoad);
        operands(kIntegers);
        break;
      case Op::kGlobalStore: case Op::kSharedStore: case Op::kLocalStore:
        memory();
        i.address = address(without(0), i.op == Op::kGlobalStore);
        operands(kIntegers, false);
        break;
      case Op::kGlobalAtomic: case Op::kSharedAtomic:
        atomic();
        break;
      case Op::kSharedMatrices:
        if (!take("16")) unknown("matrices");
        i.wraps = take("MT88");
        if (!i.wraps && !take("M88")) unknown("matrices");
        i.variant = take("4") ? 4 : take("2") ? 2 : 1;
        i.address = address(without(1));
        operands(kIntegers);
        break;
      case Op::kStoreMatrices:
        if (!take("16")) unknown("matrices");
        i.wraps = take("MT88");
        if (!i.wraps && !take("M88")) unknown("matrices");
        i.variant = take("4") ? 4 : take("2") ? 2 : 1;
        i.address = address(without(0));
        operands(kIntegers, false);
        break;
      case Op::kCopyToShared:
        take("BYPASS"), take("ACCESS"), take("LTC128B");
        memory();
        i.address = address(without(0)), i.second = address(without(0), true);
        operands(kIntegers, false, 0);
        break;
      case Op::kMma:
        if (!take("16816")) unknown("product");
        if (!take("F32")) unknown("product");
        i.brain = take("BF16");
        operands(kIntegers);
        break;
      case Op::kGroupMma: {
        if (!take("64x64x16") || !take("F32")) unknown("product");
        i.brain = take("BF16");
        const string_view matrices = without(1);
        const size_t close = matrices.find(']');
        uint16_t row;
        if (matrices.substr(0, 6) != "gdesc[" || matrices.substr(close + 1) != ".tnspB" ||
            !is_register(matrices.substr(6, close - 6), row))
          unknown("matrices");
        i.address.uniform = row;
        if (arguments_.back() == "gsb0") arguments_.pop_back();
        operands(kIntegers);
        break;
      }
      case Op::kBarrier:
        take("DEFER_BLOCKING");
        i.variant = take("SYNC") ? 0 : take("RED") ? 1 : 2;
        if (i.variant == 2) unknown("barrier");
        if (i.variant == 1) i.variant = take("POPC") ? 1 : take("AND") ? 2 : take("OR") ? 3 : 0;
        if (i.variant == 0 && arguments_.size() > 1) unknown("barrier for a part of the block");
        if (integer(without(0)) != 0) unknown("barrier other than 0");
        operands(kIntegers, false, 0);
        break;
      case Op::kBarrierResult:
        take("RESULT");
        operands(kIntegers);
        break;
      case Op::kBranch:
        i.any = take("U");
        take("INC"), take("DEC");
        if (take("DIV")) i.op = Op::kBranchDivergent;
        i.immediate = target(without(arguments_.size() - 1));
        operands(kIntegers, false, 0);
        break;
      case Op::kCall:
        take("REL"), take("NOINC");
        i.op = Op::kBranch;
        i.immediate = target(without(0));
        break;
      case Op::kBranchIndexed: case Op::kReturn: {
        take("REL"), take("NODEC");
        const string_view both = without(0);
        const size_t space = both.find(' ');
        add_source(both.substr(0, space), kIntegers);
        i.immediate = static_cast<uint32_t>(integer(both.substr(space + 1)));
        break;
      }
      case Op::kExit:
        operands(kIntegers, false, 0);
        break;
      case Op::kTrap:
        break;
      case Op::kReconverge: case Op::kConverge: case Op::kBreak:
        take("RECONVERGENT"), take("RELIABLE");
        i.bank = barrier(without(i.op == Op::kBreak ? arguments_.size() - 1 : 0));
        if (i.op == Op::kReconverge) without(0);
        operands(kIntegers, false, 0);
        break;
      case Op::kMoveBarrier: {
        take("32");
        i.any = take("CLEAR");
        const size_t at = arguments_[0].front() == 'B' ? 0 : 1;
        i.bank = barrier(without(at));
        i.variant = at;  // 0: into the barrier
        operands(kIntegers, at == 1);
        break;
      }
      case Op::kWarpSync:
        i.variant = take("ALL") ? 1 : take("COLLECTIVE") ? 2 : take("EXCLUSIVE") ? 3 : 0;
        if (i.variant == 2) without(1);
        operands(kIntegers, false, 0);
        break;
      case Op::kImadWide: case Op::kImadHigh: case Op::kLeaHigh: case Op::kHalfToFloat: case Op::kBranchDivergent:
        unknown("instruction");
    }
  }

  // An argument, taken out of the list.
  string_view without(size_t at) {
    if (at >= arguments_.size()) unknown("operands");
    const string_view result = arguments_[at];
    arguments_.erase(arguments_.begin() + at);
    return result;
  }

  // LEA d, a, b, shift; LEA.HI d, a, b, upper half of a, shift; LEA.HI.SX32 lacks the latter.
  void lea() {
    size_t at = arguments_.size();
    while (at > 0 && is_predicate(arguments_[at - 1])) --at;
    result_.immediate = static_cast<uint32_t>(integer(without(at - 1)));
    operands(kIntegers);
  }

  // To and from which type; of one name that which it can be.
  void conversion() {
    const bool from_float = result_.op == Op::kFloatToInt, to_float = result_.op == Op::kIntToFloat;
    Type first{}, second{};
    if (!take(kTypes, first)) return;
    const bool two = take(kTypes, second);
    if (two) {
      result_.type = first, result_.from = second;
    } else if (to_float && first < Type::kF16) {
      result_.from = first;
    } else if (to_float) {
      result_.type = first;
    } else if (from_float && first >= Type::kF16) {
      result_.from = first;
    } else {
      result_.type = first;
    }
  }

  // With an immediate, a pair of halves is printed as two operands.
  void halves() {
    // Both halves of an immediate are printed.
    if (arguments_.size() == (name_ == "VHMNMX" ? 6 : 5) && (result_.op == Op::kHalfFma || name_ == "VHMNMX")) without(3);
    operands(kHalves);
  }

  void atomic() {
    Instruction& i = result_;
    for (const char* word : {"E", "STRONG", "GPU", "SYS", "CTA", "RN", "FTZ"}) take(word);
    if (take("POPC")) {  // counts the lanes of each address
      take("INC"), take("32");
      i.atomic = Atomic::kAdd, i.variant = 1;
    } else if (!take(kAtomics, i.atomic)) {
      unknown("atomic operation");
    }
    i.bytes = take("64") ? 8 : 4;
    i.type = i.bytes == 8 ? Type::kU64 : Type::kU32;
    if (take("S32")) i.type = Type::kS32;
    if (take("S64")) i.type = Type::kS64, i.bytes = 8;
    if (take("F32")) i.type = Type::kF32;
    if (take("F64")) i.type = Type::kF64, i.bytes = 8;
    const auto place = std::find_if(arguments_.begin(), arguments_.end(), [](string_view text) {
      return text.back() == ']' && text.substr(0, 2) != "c[";
    });
    if (place == arguments_.end()) unknown("operands");
    const size_t at = place - arguments_.begin();
    i.address = address(without(at), i.op == Op::kGlobalAtomic);
    operands(kIntegers, at > 0, 1);
  }

  static bool is_zero(const Source& source) {
    return !source.pool && (source.row == kZero || source.row == kUniformZero) && !source.modified;
  }

  Kernel& kernel_;
  std::map<std::pair<uint8_t, uint32_t>, uint32_t>& rows_;
  const uint32_t word_;
  const string_view text_;
  string_view name_;
  std::vector<string_view> modifiers_, arguments_;
  Instruction result_;
};

string_view line_of(string_view& text) {
  const size_t end = std::min(text.find('\n'), text.size());
  const string_view line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return line;
}

string_view word_of(string_view& line) {
  const size_t end = std::min(line.find(' '), line.size());
  const string_view word = line.substr(0, end);
  line.remove_prefix(std::min(end + 1, line.size()));
  return word;
}

uint32_t number_of(string_view text, int base) {
  uint32_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value, base);
  return value;
}

std::string bytes_of(string_view hex) {
  std::string bytes(hex.size() / 2, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(number_of(hex.substr(2 * i, 2), 16));
  return bytes;
}

std::unique_ptr<Kernel> parse(const std::string& name, string_view text) {
  auto kernel = std::make_unique<Kernel>();
  kernel->name = demangled(name);
  string_view head = line_of(text);
  for (unsigned* number : {&kernel->registers, &kernel->shared, &kernel->frame})
    *number = number_of(word_of(head), 10);
  while (!head.empty()) {
    const unsigned offset = number_of(word_of(head), 10);
    kernel->arguments.push_back({offset, number_of(word_of(head), 10)});
  }
  kernel->banks.resize(8);
  std::map<std::pair<uint8_t, uint32_t>, uint32_t> rows;
  while (!text.empty()) {
    string_view line = line_of(text);
    const string_view first = word_of(line);
    if (first == "constant") {
      const unsigned bank = number_of(word_of(line), 10);
      kernel->banks[bank] = bytes_of(line);
      continue;
    }
    const uint32_t word = number_of(word_of(line), 16);
    const string_view source = word_of(line);
    try {
      if (number_of(first, 16) != 16 * kernel->code.size()) unknown("address");
      kernel->code.push_back(Decoder(*kernel, rows, word, line).decode());
      kernel->text.push_back(line), kernel->sources.push_back(source);
    } catch (const std::exception& error) {
      throw std::runtime_error(
          kernel->name + ", /*" + std::string(first) + "*/ " + std::string(line) + ": " + error.what());
    }
  }
  return kernel;
}

}  // namespace

const char* name_of(Class kind) {
  static const char* const names[] = {
      "integer", "float", "special", "half", "double", "tensor", "global load", "global store", "global atomic",
      "shared load", "shared store", "shared atomic", "local", "constant", "warp", "barrier", "control"};
  static_assert(std::size(names) == size_t(Class::kClasses));
  return names[size_t(kind)];
}

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), &std::free);
  std::string result = status == 0 ? text.get() : name;
  for (const char* noise : {"(anonymous namespace)::", "bcmfnet::", "void "})
    for (size_t at; (at = result.find(noise)) != std::string::npos;) result.erase(at, std::string(noise).size());
  // Without the parameters.
  int depth = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    depth += (result[i] == '<') - (result[i] == '>');
    if (result[i] == '(' && depth == 0) return result.substr(0, i);
  }
  return result;
}

void Module::add(std::string text, bool repeats) {
  string_view listing = texts_.emplace_back(std::move(text));
  while (!listing.empty()) {
    const size_t end = listing.find("\nkernel ", 1);
    string_view part = listing.substr(0, end == listing.npos ? end : end + 1);
    listing.remove_prefix(part.size());
    word_of(part);  // kernel
    const std::string name(word_of(part));
    listings_[name] = {part, repeats};
  }
}

std::string Module::listing(const std::string& part) const {
  for (const auto& [name, listing] : listings_)
    if (name.find(part) != name.npos) return std::string(listing.text);
  return "";
}

const Kernel& Module::kernel(const std::string& name) {
  auto& kernel = kernels_[name];
  if (kernel == nullptr) {
    const auto found = listings_.find(name);
    if (found == listings_.end()) throw std::runtime_error(demangled(name) + ": not in the listing");
    kernel = parse(name, found->second.text);
    kernel->repeats = found->second.repeats;
  }
  return *kernel;
}

}  // namespace sass
