#include "kernels/weight_store.h"

#include <iterator>

namespace actzip {

void WeightStore::lend(const std::string& key, SharedFloats array, int64_t count) {
  if (reinterpret_cast<uintptr_t>(array.get()) % 64 != 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_[key] = {std::move(array), count, false};
}

SharedFloats WeightStore::get(const std::string& key, int64_t count,
                              const std::function<void(float*)>& pack) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry& e = entries_[key];
  if (e.array == nullptr || e.count != padded(count)) {
    Floats fresh = make_weights(padded(count));
    pack(fresh.get());
    e.array = std::move(fresh);
    e.count = padded(count);
  }
  e.used = true;
  return e.array;
}

void WeightStore::drop_idle() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto it = entries_.begin(); it != entries_.end();)
    it = it->second.array.use_count() == 1 ? entries_.erase(it) : std::next(it);
}

std::vector<std::pair<std::string, WeightStore::Entry>> WeightStore::used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::pair<std::string, Entry>> found;
  for (const auto& [key, entry] : entries_)
    if (entry.used) found.emplace_back(key, entry);
  return found;
}

}  // namespace actzip
