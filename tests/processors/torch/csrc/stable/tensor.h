// Stands in for torch's header of this name: the part of its stable interface that csrc uses, without torch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace torch {

namespace headeronly {
enum class ScalarType : int64_t { Float, Half, BFloat16, Byte, Short, Int, Long };
}

namespace stable {

// Copies share their memory.
class Tensor {
 public:
  Tensor() = default;
  Tensor(headeronly::ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides,
         std::shared_ptr<char> memory, int64_t offset)
      : type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)), memory_(std::move(memory)),
        data_(memory_.get() + offset) {}

  headeronly::ScalarType scalar_type() const { return type_; }
  int64_t size(int64_t axis) const { return sizes_.at(axis); }
  int64_t stride(int64_t axis) const { return strides_.at(axis); }
  const void* const_data_ptr() const { return data_; }
  void* mutable_data_ptr() const { return data_; }

  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes_) count *= size;
    return count;
  }

 private:
  headeronly::ScalarType type_{};
  std::vector<int64_t> sizes_, strides_;
  std::shared_ptr<char> memory_;
  char* data_ = nullptr;
};

}  // namespace stable
}  // namespace torch
