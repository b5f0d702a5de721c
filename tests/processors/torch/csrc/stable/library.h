// Stands in for torch's header of this name: ops are functions of boxed arguments, found by their names.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "torch/csrc/stable/tensor.h"

namespace torch::stable {

using Argument = std::variant<std::monostate, Tensor, std::vector<double>, std::vector<int64_t>, bool>;
using Boxed = bool (*)(const std::vector<Argument>& arguments);

struct Library {
  std::map<std::string, Boxed> ops;

  void def(const char*) {}
  void impl(const char* name, Boxed op) { ops[name] = op; }
};

inline Library& library() {
  static Library all;
  return all;
}

template <typename T>
T unbox(const Argument& argument) {
  if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    return std::holds_alternative<Tensor>(argument) ? T(std::get<Tensor>(argument)) : std::nullopt;
  } else {
    return std::get<T>(argument);
  }
}

template <typename Result, typename... Arguments, size_t... indices>
bool call(Result (*op)(Arguments...), const std::vector<Argument>& boxed, std::index_sequence<indices...>) {
  if constexpr (std::is_void_v<Result>) {
    op(unbox<std::decay_t<Arguments>>(boxed.at(indices))...);
    return true;
  } else {
    return op(unbox<std::decay_t<Arguments>>(boxed.at(indices))...);
  }
}

template <typename Result, typename... Arguments>
constexpr size_t count_of(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto op>
bool box(const std::vector<Argument>& arguments) {
  return call(op, arguments, std::make_index_sequence<count_of(op)>());
}

}  // namespace torch::stable

#define TORCH_BOX(function) torch::stable::box<function>
#define STAND_IN_JOIN_(a, b) a##b
#define STAND_IN_JOIN(a, b) STAND_IN_JOIN_(a, b)
#define STAND_IN_REGISTER(name, m)                                                          \
  static void name(torch::stable::Library& m);                                              \
  static const bool STAND_IN_JOIN(name, _done) = (name(torch::stable::library()), true);    \
  static void name(torch::stable::Library& m)
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) STAND_IN_REGISTER(STAND_IN_JOIN(declare_, __LINE__), m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, device, m) STAND_IN_REGISTER(STAND_IN_JOIN(serve_, __LINE__), m)
