// Internal: a node's attributes, read and checked. What does not fit throws std::invalid_argument that names
// the node.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "engine/node.h"

namespace actzip::engine {

[[noreturn]] inline void fail(const NodeSpec& s, const std::string& what) {
  throw std::invalid_argument(s.op + " '" + s.name + "': " + what);
}

inline int64_t one(const NodeSpec& s, const char* key, int64_t otherwise) {
  const auto it = s.ints.find(key);
  return it == s.ints.end() || it->second.empty() ? otherwise : it->second[0];
}
inline double number(const NodeSpec& s, const char* key, double otherwise) {
  const auto it = s.floats.find(key);
  return it == s.floats.end() || it->second.empty() ? otherwise : it->second[0];
}
inline std::vector<int64_t> list(const NodeSpec& s, const char* key, size_t length, int64_t least) {
  const auto it = s.ints.find(key);
  if (it == s.ints.end() || it->second.size() != length)
    fail(s, std::string(key) + " needs " + std::to_string(length) + " integers");
  for (int64_t v : it->second)
    if (v < least || v > (int64_t{1} << 30)) fail(s, std::string(key) + " has " + std::to_string(v));
  return it->second;
}
// The numbers of an array, which leaves the spec; empty without one.
inline std::vector<float> take(NodeSpec& s, const char* key, int64_t size) {
  std::vector<float> v;
  if (const auto own = s.arrays.find(key); own != s.arrays.end()) {
    v = std::move(own->second);
    s.arrays.erase(own);
  } else if (const auto lent = s.borrowed.find(key); lent != s.borrowed.end()) {
    v.assign(lent->second.data, lent->second.data + lent->second.size);
    s.borrowed.erase(lent);
  } else {
    return {};
  }
  if (size >= 0 && static_cast<int64_t>(v.size()) != size)
    fail(s, std::string(key) + " has " + std::to_string(v.size()) + " numbers, not " + std::to_string(size));
  return v;
}
inline const ValueSpec& value(const Values& values, int i) { return values[static_cast<size_t>(i)]; }
inline bool is_map(const Values& values, int i) { return value(values, i).layout != Layout::plain; }
inline bool is_packed(const Values& values, int i) { return value(values, i).layout == Layout::packed; }
inline void arity(const NodeSpec& s, size_t least, size_t most) {
  if (s.inputs.size() < least || s.inputs.size() > most) fail(s, std::to_string(s.inputs.size()) + " inputs");
}
inline void same_shape(const NodeSpec& s, const ValueSpec& a, const ValueSpec& b) {
  if (a.dims != b.dims || a.batch != b.batch)
    fail(s, "shapes of '" + a.name + "' and '" + b.name + "' differ");
}

}  // namespace actzip::engine
