// Packed weights that several plans share, and that a file can hold.
//
//   WeightStore store;                    one a model; its plans for other sizes find what the first has
//   packed store.lend(key, array, count);        what was packed before (a mapped file's): used where it lies
//   store.get(key, count, pack)           what is under `key`, else what `pack` writes, kept from now on
//   store.used()                          what `get` gave out so far: all that a file needs
//   store.drop_idle()                     forgets what no plan has
//
// A key says which layer's weights they are and in which order (ConvBase::keep_weights makes it): the same
// key is the same numbers. Arrays are aligned to 64 bytes and readable 64 bytes further (a lent one of
// another kind is not used). Safe from several threads at once.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/memory.h"

namespace actzip {

using SharedFloats = std::shared_ptr<const float[]>;

class WeightStore {
 public:
  struct Entry {
    SharedFloats array;
    int64_t count = 0;  // floats, those behind included
    bool used = false;
  };

  // Floats of an array for `count` weights: a cache line more, in whole cache lines.
  static int64_t padded(int64_t count) { return round_up(count + 16, 16); }

  void lend(const std::string& key, SharedFloats array, int64_t count);
  SharedFloats get(const std::string& key, int64_t count, const std::function<void(float*)>& pack);
  std::vector<std::pair<std::string, Entry>> used() const;
  void drop_idle();

 private:
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;
};

}  // namespace actzip
