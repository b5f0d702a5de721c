// Runs one private op of csrc without torch: reads its name and arguments from the standard input, and writes what it
// returned and the memory of every tensor to the standard output. tests/processors/driver.py has the other side.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include <torch/csrc/stable/library.h>

namespace {

using torch::stable::Argument;
using torch::stable::Tensor;

enum Kind : int64_t { kNothing, kTensor, kReals, kIntegers, kFlag };

struct Memory {
  std::shared_ptr<char> at;
  int64_t bytes;
};

void read(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, bytes, 1, stdin) != 1) throw std::runtime_error("the call ends too early");
}

void write(const void* from, size_t bytes) {
  if (bytes > 0 && std::fwrite(from, bytes, 1, stdout) != 1) throw std::runtime_error("nobody reads the answer");
}

int64_t read_integer() {
  int64_t value;
  read(&value, sizeof(value));
  return value;
}

// A list: how many, then each.
template <typename List>
List read_list() {
  List list(read_integer(), {});
  read(list.data(), list.size() * sizeof(list[0]));
  return list;
}

// Aligned as torch does it.
Memory read_memory() {
  constexpr int64_t kLine = 64;
  const int64_t bytes = read_integer();
  char* const memory = static_cast<char*>(std::aligned_alloc(kLine, (bytes / kLine + 1) * kLine));
  read(memory, bytes);
  return {{memory, std::free}, bytes};
}

Argument read_argument(std::vector<Memory>& memories) {
  switch (read_integer()) {
    case kNothing: return {};
    case kReals: return read_list<std::vector<double>>();
    case kIntegers: return read_list<std::vector<int64_t>>();
    case kFlag: return read_integer() != 0;
    case kTensor: {
      const auto type = static_cast<torch::headeronly::ScalarType>(read_integer());
      auto sizes = read_list<std::vector<int64_t>>(), strides = read_list<std::vector<int64_t>>();
      const int64_t offset = read_integer();
      memories.push_back(read_memory());
      return Tensor(type, std::move(sizes), std::move(strides), memories.back().at, offset);
    }
    default: throw std::runtime_error("an argument of no kind that there is");
  }
}

}  // namespace

int main() {
  const auto name = read_list<std::string>();
  std::vector<Memory> memories;
  std::vector<Argument> arguments(read_integer());
  for (Argument& argument : arguments) argument = read_argument(memories);
  const int64_t result = torch::stable::library().ops.at(name)(arguments);
  write(&result, sizeof(result));
  for (const Memory& memory : memories) write(memory.at.get(), memory.bytes);
}
